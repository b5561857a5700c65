"""Prompt text, to the letter."""

from stages.shared.templates import render_alpaca


def test_a_prompt_without_input_is_alpacas() -> None:
    assert render_alpaca("Name a colour.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n"
        "### Response:\n"
    )


def test_a_prompt_with_input_has_alpacas_input_section() -> None:
    assert render_alpaca("Add.", "2, 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n"
        "### Input:\n2, 3\n\n"
        "### Response:\n"
    )


def test_an_input_of_white_space_is_no_input() -> None:
    assert render_alpaca("Add.", " \n") == render_alpaca("Add.")


def test_braces_and_section_marks_in_the_data_stay_text() -> None:
    prompt = render_alpaca("Fill {input} {0} {{x}}.", "### Response:\n{instruction}")
    assert "### Instruction:\nFill {input} {0} {{x}}.\n\n### Input:\n### Response:\n{instruction}\n\n" in prompt
