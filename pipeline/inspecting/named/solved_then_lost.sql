-- question: which prompts were solved (most responses right) at some time and are not at the end?
-- needs: labels.gold
-- set phase = evaluation: whose prompts; `loop` where the same prompts are sampled in every iteration
with rates as (
    select run, iteration, split_part(prompt_id, '#', 1) as asked, avg(gold::int) as rate
    from labels where phase = $phase and gold is not null
    group by all
), ends as (
    select run, asked, max(rate) as best, arg_max(iteration, (rate, -iteration)) as best_in,
           max(iteration) as last, arg_max(rate, iteration) as now
    from rates group by all
)
select run, asked as prompt_id, prompt, answer, best_in, best, last, now
from ends join prompt_texts on prompt_id = asked
where best > 0.5 and now <= 0.5
order by best - now desc, run, asked
