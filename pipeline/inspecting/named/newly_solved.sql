-- question: which prompts were not solved (most responses right) at first and are at the end?
-- needs: labels.gold
-- set phase = evaluation: whose prompts; `loop` where the same prompts are sampled in every iteration
with rates as (
    select run, iteration, split_part(prompt_id, '#', 1) as asked, avg(gold::int) as rate
    from labels where phase = $phase and gold is not null
    group by all
), ends as (
    select run, asked, arg_min(rate, iteration) as first, max(iteration) as last, arg_max(rate, iteration) as now
    from rates group by all
)
select run, asked as prompt_id, prompt, answer, first, last, now
from ends join prompt_texts on prompt_id = asked
where first <= 0.5 and now > 0.5
order by now - first desc, run, asked
