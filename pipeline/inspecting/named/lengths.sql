-- question: how long are responses, iteration by iteration, and how many are cut?
-- needs: rollouts.response_tokens
select run, phase, iteration, count(*) as responses, avg(length) as mean, quantile_cont(length, 0.5) as median,
       quantile_cont(length, 0.95) as p95, max(length) as longest, avg((finish = 'length')::int) as cut
from (select *, len(response_tokens) as length from rollouts where sample >= 0)
where phase <> 'foundations'
group by all
order by run, phase desc, iteration
