-- question: how many groups taught nothing because all their rewards were equal: all right, or all wrong?
-- needs: labels.reward
with groups as (
    select run, iteration, prompt_id, min(reward) as low, max(reward) as high
    from labels where phase = 'loop' and sample >= 0
    group by all
), seen as (
    select *, (min(low) over (partition by run) + max(high) over (partition by run)) / 2 as middle from groups
)
select run, iteration, count(*) as groups, count(*) filter (low = high) as silent, avg((low = high)::int) as share,
       count(*) filter (low = high and low > middle) as all_high,
       count(*) filter (low = high and low <= middle) as all_low
from seen
group by all
order by run, iteration
