-- question: do sampler and trainer agree on log-probabilities, and does it get worse further into the response?
-- needs: scores.old_logprobs, rollouts.sampler_logprobs
-- set width = 16: tokens of a bin
with tokens as (
    select run, iteration, unnest(range(len(sampler_logprobs))) as position,
           unnest(sampler_logprobs) as sampler, unnest(old_logprobs) as trainer
    from rollouts join scores using (run, phase, iteration, prompt_id, sample)
    where phase = 'loop' and old_logprobs is not null
)
select run, (position // $width) * $width as from_token, count(*) as tokens, avg(sampler - trainer) as mean,
       avg(abs(sampler - trainer)) as mean_absolute, max(abs(sampler - trainer)) as largest
from tokens
group by all
order by run, from_token
