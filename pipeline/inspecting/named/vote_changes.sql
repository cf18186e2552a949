-- question: on which prompts did the majority's answer change, and how divided was the vote?
-- needs: labels.vote_share
with answers as (
    select run, phase, iteration, prompt_id, extracted, count(*) as votes,
           bool_or(gold) as gold
    from labels where vote_share is not null and extracted is not null and sample >= 0
    group by all
), ballots as (
    select run, phase, iteration, prompt_id, arg_min(extracted, (-votes, extracted)) as winner,
           max(votes) as votes,
           arg_min(gold, (-votes, extracted)) as winner_right, sum(votes)::bigint as votes_cast,
           sum(-(votes / total) * ln(votes / total)) as entropy
    from (select *, sum(votes) over (partition by run, phase, iteration, prompt_id) as total from answers)
    group by all
), steps as (
    select *, split_part(prompt_id, '#', 1) as asked, lag(winner) over earlier as before,
           lag(iteration) over earlier as since, lag(entropy) over earlier as entropy_before
    from ballots
    window earlier as (partition by run, phase, split_part(prompt_id, '#', 1) order by iteration, prompt_id)
)
select run, phase, since, iteration, asked as prompt_id, answer, before, winner as after, votes, votes_cast, winner_right,
       entropy_before, entropy
from steps left join prompt_texts on prompt_texts.prompt_id = asked
where before is distinct from winner and since is not null
order by run, phase, iteration, asked
