-- question: what does the reward love that is wrong by the reference: the highest rewards of wrong responses
-- needs: labels.gold
-- set k = 20: rows
select run, iteration, prompt_id, sample, coalesce(reward_score, reward) as score, reward, extracted, answer, length,
       left(response, 120) as response
from responses
where phase = 'loop' and not gold
order by score desc, run, iteration, prompt_id, sample
limit $k
