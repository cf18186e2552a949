-- question: where do the run's labels and those made again beside them disagree (`rlhf relabel`, `rlhf redo`)?
-- needs: labels_redone.verdict
-- set k = 50: rows
select o.run, o.iteration, n.variant, o.prompt_id, o.sample, o.extracted, o.target, o.verdict as verdict_before,
       n.verdict as verdict_after, o.reward as reward_before, n.reward as reward_after, left(response, 80) as response
from labels o
join labels_redone n using (run, phase, iteration, prompt_id, sample)
left join rollouts using (run, phase, iteration, prompt_id, sample)
where o.verdict is distinct from n.verdict or o.reward is distinct from n.reward
order by o.run, o.iteration, n.variant, o.prompt_id, o.sample
limit $k
