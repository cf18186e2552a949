"""The ledger of reference cases: each is a golden case of ours, or is left out for a reason."""

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
GOLDEN = {file.name: json.loads(file.read_text()) for file in sorted((TESTS / "golden").glob("*.json"))}
LEDGER = GOLDEN.pop("vectors.json")
FILES = sorted({entry["case"] for entry in LEDGER if "case" in entry})
MOST_LEFT_OUT = 10
NAMES = {
    "gae": (
        "terminal_reward_gamma1_lam1.0 terminal_reward_gamma1_lam0.0 terminal_reward_gamma1_lam0.95 "
        "gamma0.9_lam0.95 right_padding interior_observation_token truncated_as_terminal_minus1 single_token "
        "ppo_rlhf_kl_in_reward score_on_last_token_vs_one_past"
    ),
    "whitening": "four_tokens masked shift_mean_false constant",
    "decoupled_gae": (
        "lam_critic1_lam_policy.95 seed_note_reversed_is_wrong reward_decay value_pretraining_explained_variance"
    ),
    "length_adaptive_lambda": "alpha0.05 toy_alpha0.5_l4 per_sequence_batch",
    "grpo": (
        "binary_half pm1_affine_invariance one_in_eight real_valued all_equal singleton process_supervision "
        "grad_coefficient_A1.0 grad_coefficient_A-1.0"
    ),
    "rloo": "k4 k2 kl_placement",
    "remax": "paper official_code verl",
    "reinforce_pp": "k1_global_norm gamma0.99 baseline_variant",
    "kl_estimators": "per_token expectation_two_outcomes",
    "dapo": (
        "overlong_penalty all_correct_group_with_overlong mixed_group dynamic_sampling_filter "
        "std_of_equal_floats_three_0.1 std_of_equal_floats_sixteen_0.7 std_of_equal_floats_accuracy_1.0 "
        "clip_higher_example"
    ),
    "clipped_policy_loss": "A=+1 A=-1 log_ratio_clamp",
    "aggregation": "two_sequences fully_masked_row dapo_eq8_literal_vs_batch_token_mean per_token_weight_of_each_reply",
    "value_loss": "clipped",
    "kl_controller": "adaptive",
    "ptx": "combined",
    "vapo_lm_loss": "token_mean_over_correct",
    "reward_model": (
        "bradley_terry_K4_ranked with_ties_dropped pairs_per_prompt best_of_4_ce margin_and_center "
        "bias_normalisation gain_bias_normalisation"
    ),
    "majority_vote": (
        "basic vote6_train_first4 tie_first_seen empty_answers None_dropped_ratio_denominator "
        "string_votes_vs_equivalence lucky_hit all_empty"
    ),
    "rlsc": "exact_3class alpha_term_off_temperature loss_two_replies underflow mean_vs_sum_variant",
    "whole_loss": "grpo_two_replies dapo_two_replies reinforce_pp_baseline trl_rloo_sequence_ratio",
    "metrics": "avg_at_k_and_pass_at_k logp_at_temperature",
}


def _cases(node):
    """Every golden case below a node of a golden file that says which reference case it is."""
    if isinstance(node, dict) and "vector" in node:
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _cases(child)


def test_every_reference_case_is_in_the_ledger_once():
    assert [entry["vector"] for entry in LEDGER] == [
        f"{section}/{name}" for section, names in NAMES.items() for name in names.split()
    ]
    assert len(LEDGER) == len({entry["vector"] for entry in LEDGER}) == 86


def test_an_entry_names_a_file_or_says_in_a_sentence_why_there_is_none():
    for entry in LEDGER:
        assert entry.keys() in ({"vector", "case"}, {"vector", "left_out"}), entry
        assert "left_out" not in entry or (len(entry["left_out"].split()) > 5 and entry["left_out"].endswith(".")), (
            entry
        )


def test_few_are_left_out():
    assert sum("left_out" in entry for entry in LEDGER) <= MOST_LEFT_OUT


@pytest.mark.parametrize("file", FILES)
def test_what_the_ledger_says_of_a_file_is_in_it(file):
    listed = {entry["vector"] for entry in LEDGER if entry.get("case") == file}
    assert sorted(listed - {case["vector"] for case in _cases(GOLDEN.get(file, []))}) == []


def test_no_golden_case_claims_what_the_ledger_does_not_know_or_leaves_out():
    known = {entry["vector"] for entry in LEDGER if "case" in entry}
    assert sorted({case["vector"] for case in _cases(list(GOLDEN.values()))} - known) == []


@pytest.mark.parametrize("file", FILES)
def test_every_section_with_reference_cases_has_origins_and_a_test_that_reads_it(file):
    readers = [path.read_text() for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    text = "".join(reader for reader in readers if f'"{file}"' in reader)
    for section, cases in GOLDEN.get(file, {}).items():
        claimed = list(_cases(cases))
        assert all(case["origin"] for case in claimed), section
        assert not claimed or f'"{section}"' in text, f"no test reads {section} of {file}"
