import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from homefire.quickstart import task

numbers = st.text(alphabet=task.DIGITS, min_size=3, max_size=5)


@given(numbers)
def test_the_solution_earns_the_reward(prompt):
    assert task.reward(prompt, task.solve(prompt)) == 1.0
    assert task.reward(prompt, f" {task.solve(prompt)}\n") == 1.0


@given(numbers, numbers)
def test_anything_but_the_digits_in_order_earns_nothing(prompt, answer):
    right = list(answer) == sorted(prompt)
    assert task.reward(prompt, answer) == (1.0 if right else 0.0)


def test_a_demonstration_is_wrong_in_exactly_one_digit_as_often_as_asked():
    rng = random.Random(7)
    shown = [task.demonstration(rng, wrong_share=0.8) for _ in range(2000)]

    wrong_digits = Counter(
        sum(a != b for a, b in zip(each.answer, task.solve(each.prompt), strict=True))
        for each in shown
    )

    assert set(wrong_digits) == {0, 1}
    assert abs(wrong_digits[1] / 2000 - 0.8) < 0.04


def test_a_seed_fixes_the_demonstrations():
    def first_ten(seed):
        rng = random.Random(seed)
        return [task.demonstration(rng, wrong_share=0.8) for _ in range(10)]

    assert first_ten(3) == first_ten(3)
    assert first_ten(3) != first_ten(4)


def test_the_held_out_set_is_the_stored_one():
    prompts = task.held_out_prompts()

    assert len(set(prompts)) == 512
    assert all(3 <= len(p) <= 5 and set(p) <= set(task.DIGITS) for p in prompts)
    assert (
        task.prompts_sha256(prompts)
        == "151f6d044d0aa8ad22a0b4cb0a910c07e018274efcea51310b81d802d5c8a85b"
    )


def test_no_held_out_prompt_is_trained_on():
    rng = random.Random(1)
    trained = {task.training_prompt(rng) for _ in range(5000)}

    assert trained.isdisjoint(task.held_out_prompts())


def test_the_digest_of_a_prompt_set_depends_on_its_order():
    assert task.prompts_sha256(("12", "3")) != task.prompts_sha256(("3", "12"))
    assert task.prompts_sha256(("12", "3")) != task.prompts_sha256(("1", "23"))
