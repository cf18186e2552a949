-- question: which responses could the grader not judge (timeout, error, bad reference), and how often?
-- needs: labels.verdict
select run, phase, iteration, verdict, count(*) as responses, count(distinct prompt_id) as prompts,
       min(prompt_id) as for_example, any_value(left(response, 80) order by prompt_id, sample) as response
from responses
where verdict in ('timeout', 'error', 'bad reference')
group by all
order by responses desc, run, phase, iteration, verdict
