-- question: do longer responses get more reward? Correlation of length and reward, iteration by iteration.
-- needs: labels.reward
select run, iteration, count(*) as responses, avg(length) as length, avg(reward) as reward,
       corr(length, reward) as correlation,
       avg(length) filter (gold) as length_right, avg(length) filter (not gold) as length_wrong
from responses
where phase = 'loop' and sample >= 0
group by all
order by run, iteration
