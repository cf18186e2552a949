-- question: which prompts were never answered rightly, however often they were asked?
-- needs: labels.gold
-- set least = 1: at least so many responses
select run, split_part(prompt_id, '#', 1) as prompt_id, any_value(prompt) as prompt, any_value(answer) as answer,
       count(*) as responses, count(distinct (phase, iteration)) as times_asked,
       mode(extracted order by extracted) as usual_answer
from responses
where gold is not null
group by run, split_part(prompt_id, '#', 1)
having not bool_or(gold) and count(*) >= $least
order by responses desc, run, prompt_id
