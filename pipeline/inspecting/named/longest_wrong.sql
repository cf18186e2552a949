-- question: which wrong responses are the longest?
-- needs: labels.gold
-- set k = 20: rows
select run, phase, iteration, prompt_id, sample, length, finish, extracted, answer, left(response, 120) as response
from responses
where not gold
order by length desc, run, phase, iteration, prompt_id, sample
limit $k
