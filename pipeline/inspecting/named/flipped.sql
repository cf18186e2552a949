-- question: which prompts went from solved to lost, or back, between two evaluations?
-- needs: labels.gold
-- set phase = evaluation: whose prompts; `loop` where the same prompts are sampled in every iteration
with rates as (
    select run, iteration, prompt_id, avg(gold::int) as rate
    from labels where phase = $phase and gold is not null
    group by all
), steps as (
    select *, lag(rate) over earlier as before, lag(iteration) over earlier as since
    from rates window earlier as (partition by run, prompt_id order by iteration)
)
select run, since, iteration, steps.prompt_id, prompt, answer, before, rate as after,
       if(rate > before, 'solved', 'lost') as flip
from steps join prompt_texts on prompt_texts.prompt_id = split_part(steps.prompt_id, '#', 1)
where (before > 0.5) <> (rate > 0.5)
order by run, iteration, abs(rate - before) desc, steps.prompt_id
