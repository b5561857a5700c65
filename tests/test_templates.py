"""The exact prompt text of the Alpaca template, and the selection of a template file."""

from pathlib import Path

from stages.templates.alpaca import render_alpaca
from stages.templates.selection import SELECTED_TEMPLATE, select_template


def test_a_prompt_without_input_has_the_text_of_alpaca() -> None:
    assert render_alpaca("Name a color.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a color.\n\n"
        "### Response:\n"
    )


def test_a_prompt_with_input_has_the_input_section_of_alpaca() -> None:
    assert render_alpaca("Add.", "2, 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n"
        "### Input:\n2, 3\n\n"
        "### Response:\n"
    )


def test_an_input_of_whitespace_is_treated_as_empty() -> None:
    assert render_alpaca("Add.", " \n") == render_alpaca("Add.")


def test_braces_and_section_headings_in_the_data_stay_text() -> None:
    prompt = render_alpaca("Fill {input} {0} {{x}}.", "### Response:\n{instruction}")
    assert "### Instruction:\nFill {input} {0} {{x}}.\n\n### Input:\n### Response:\n{instruction}\n\n" in prompt


def test_the_selected_template_is_a_copy_of_the_jinja_file_or_a_comment_with_the_built_in_name(project: Path) -> None:
    (project / "templates").mkdir()
    (project / "templates/mine.jinja").write_text("{{ messages }} →\n", encoding="utf-8")
    select_template("templates/mine.jinja")
    assert Path("data/template.jinja") == SELECTED_TEMPLATE
    assert SELECTED_TEMPLATE.read_text(encoding="utf-8") == "{{ messages }} →\n"
    select_template("alpaca")
    assert SELECTED_TEMPLATE.read_bytes() == b"{# alpaca #}\n"
    select_template("chat")
    assert SELECTED_TEMPLATE.read_bytes() == b"{# chat #}\n"
