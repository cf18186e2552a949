-- question: which responses were cut at the length limit and rewarded all the same?
-- needs: labels.reward
-- set k = 50: rows
select run, iteration, prompt_id, sample, length, reward, verdict, keep, right(response, 80) as ends_with
from responses
where phase = 'loop' and finish = 'length' and reward > 0
order by reward desc, length desc, run, iteration, prompt_id, sample
limit $k
