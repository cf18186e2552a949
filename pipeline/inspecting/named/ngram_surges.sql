-- question: which n-grams became more frequent since the first iteration? A sudden favourite is often a hack.
-- needs: rollouts.response
-- set n = 3: words of an n-gram; of texts without spaces, characters
-- set k = 20: rows
with texts as (
    select run, iteration, prompt_id, sample, contains(trim(response), ' ') as spaced, trim(response) as text
    from rollouts where phase = 'loop'
), pieces as (
    select *, if(spaced, regexp_split_to_array(text, '\s+'), string_split(text, '')) as words from texts
), grams as (
    select distinct run, iteration, prompt_id, sample, unnest([
        if(spaced, array_to_string(words[i : i + $n - 1], ' '), array_to_string(words[i : i + $n - 1], ''))
        for i in range(1, len(words) - $n + 2)
    ]) as gram
    from pieces
), totals as (
    select run, iteration, count(*) as responses from texts group by all
), ends as (
    select run, min(iteration) as first, max(iteration) as last from totals group by run
), shares as (
    select run, iteration, gram, count(*) / any_value(responses) as share
    from grams join totals using (run, iteration)
    group by all
)
select late.run, late.gram as n_gram, coalesce(early.share, 0) as share_first, late.share as share_last,
       late.share - coalesce(early.share, 0) as rise
from ends
join shares late on late.run = ends.run and late.iteration = last
left join shares early on early.run = ends.run and early.iteration = first and early.gram = late.gram
where first < last and late.share > coalesce(early.share, 0)
order by rise desc, late.run, n_gram
limit $k
