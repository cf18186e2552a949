-- question: how many responses to a prompt are word for word the same, and which one is the most repeated?
-- needs: rollouts.response
with texts as (
    select run, iteration, prompt_id, response, count(*) as times
    from rollouts where phase = 'loop' and sample >= 0
    group by all
)
select run, iteration, sum(times)::bigint as responses, count(*) as different,
       1 - count(*) / sum(times) as share_repeated,
       max(times) as most_times, arg_min(prompt_id, (-times, prompt_id, response)) as for_prompt,
       left(arg_min(response, (-times, prompt_id, response)), 80) as most_repeated
from texts
group by all
order by run, iteration
