-- question: when the policy is sure, is it right? Responses by tenths of their confidence (mean token probability).
-- needs: rollouts.sampler_logprobs, labels.gold
-- set bins = 10: equally large groups of responses
with binned as (
    select run, gold, confidence, reward,
           ntile($bins::int) over (partition by run order by confidence, iteration, prompt_id, sample) as bin
    from responses
    where phase = 'loop' and sample >= 0 and gold is not null and confidence is not null
)
select run, bin, count(*) as responses, avg(confidence) as confidence, avg(gold::int) as right, avg(reward) as reward
from binned
group by all
order by run, bin
