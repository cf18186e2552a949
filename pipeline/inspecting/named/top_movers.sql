-- question: which responses push the policy most, up or down (mean advantage over their tokens)?
-- needs: advantages.advantages
-- set k = 10: so many up, and so many down
with ranked as (
    select *, row_number() over (order by advantage desc, run, iteration, prompt_id, sample) as up,
           row_number() over (order by advantage, run, iteration, prompt_id, sample) as down
    from responses where phase = 'loop' and advantage is not null
)
select run, iteration, prompt_id, sample, advantage, reward, verdict, length, left(response, 120) as response
from ranked
where up <= $k or down <= $k
order by advantage desc, run, iteration, prompt_id, sample
