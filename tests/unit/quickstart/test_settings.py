import pytest

from homefire.quickstart.settings import QuickstartSettings


def test_the_built_in_model_gets_the_calibrated_numbers():
    assert QuickstartSettings.for_model("tiny") == QuickstartSettings()


def test_a_pretrained_model_gets_an_instruction_and_gentle_steps():
    settings = QuickstartSettings.for_model("Qwen/Qwen3-0.6B")

    assert settings.base_model == "Qwen/Qwen3-0.6B"
    assert settings.instruction
    assert settings.rl_learning_rate < QuickstartSettings().rl_learning_rate / 10


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rl_steps", 1),
        ("supervised_steps", 0),
        ("group_size", 0),
        ("wrong_share", 1.5),
        ("rl_learning_rate", 0.0),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        QuickstartSettings(**{field: value})


def test_learning_rates_warm_up_and_fall_to_a_tenth():
    settings = QuickstartSettings(
        supervised_steps=100, warmup_steps=10, supervised_learning_rate=1.0, rl_steps=10
    )

    rates = [settings.supervised_rate(step) for step in range(100)]

    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(0.91)
    assert rates[99] == pytest.approx(0.1)
    assert settings.rl_rate(0) == settings.rl_learning_rate
    assert settings.rl_rate(5) == pytest.approx(settings.rl_learning_rate / 2)
