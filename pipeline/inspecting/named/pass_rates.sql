-- question: how hard are the prompts: how many were solved never, sometimes, always, iteration by iteration?
-- needs: labels.gold
with rates as (
    select run, phase, iteration, prompt_id, avg(gold::int) as rate
    from labels where gold is not null and sample >= 0 and phase <> 'foundations'
    group by all
)
select run, phase, iteration, count(*) as prompts, avg(rate) as mean, count(*) filter (rate = 0) as never,
       count(*) filter (rate > 0 and rate < 0.25) as below_quarter,
       count(*) filter (rate >= 0.25 and rate < 0.5) as below_half,
       count(*) filter (rate >= 0.5 and rate < 0.75) as below_three_quarters,
       count(*) filter (rate >= 0.75 and rate < 1) as nearly_always, count(*) filter (rate = 1) as always
from rates
group by all
order by run, phase desc, iteration
