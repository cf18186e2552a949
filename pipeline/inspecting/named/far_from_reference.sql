-- question: which responses has the policy moved furthest from the reference?
-- needs: scores.ref_logprobs
-- set k = 20: rows
select run, iteration, prompt_id, sample, kl_reference, kl_reference / length as per_token, reward, verdict, length,
       left(response, 120) as response
from responses
where phase = 'loop' and kl_reference is not null
order by kl_reference desc, run, iteration, prompt_id, sample
limit $k
