-- question: is the critic right: where it says v, does v come back? Tokens by tenths of the value, per run.
-- needs: scores.values, advantages.returns
-- set bins = 10: equally large groups of tokens
with tokens as (
    select run, iteration, prompt_id, sample, unnest(range(len(a.returns))) as position,
           unnest(s.values) as value, unnest(a.returns) as came_back
    from scores s join advantages a using (run, phase, iteration, prompt_id, sample)
    where phase = 'loop' and s.values is not null and a.returns is not null
), binned as (
    select *, ntile($bins::int) over (partition by run order by value, iteration, prompt_id, sample, position) as bin
    from tokens
)
select run, bin, count(*) as tokens, avg(value) as value, avg(came_back) as came_back, avg(value - came_back) as bias
from binned
group by all
order by run, bin
