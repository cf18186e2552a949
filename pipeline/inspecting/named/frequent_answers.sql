-- question: which answers does the policy give most often, and how often are they right?
-- needs: labels.extracted
-- set k = 20: rows
select run, extracted as given, count(*) as responses, count(*) / any_value(total) as share, avg(gold::int) as right
from (select *, count(*) over (partition by run) as total from labels where phase = 'loop' and sample >= 0)
where extracted is not null
group by all
order by responses desc, run, given
limit $k
