-- question: which rows do not train, and why not?
-- needs: labels.keep
select run, iteration, dropped as why, count(*) as responses, count(distinct prompt_id) as prompts,
       avg(reward) as reward, count(*) / any_value(total) as share
from (select *, count(*) over (partition by run, iteration) as total from labels where phase = 'loop' and sample >= 0)
where dropped is not null
group by all
order by run, iteration, responses desc, why
