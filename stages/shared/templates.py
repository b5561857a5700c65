"""Prompt text: the one place from which training, evaluation and generation take it."""

# Taori et al., Stanford Alpaca, 2023: https://github.com/tatsu-lab/stanford_alpaca#data-release
ALPACA = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
ALPACA_WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""

# By the value of the parameter `template`: without and with an input.
TEMPLATES = {"alpaca": (ALPACA, ALPACA_WITH_INPUT)}


def render_prompt(template: str, instruction: str, input_text: str = "") -> str:
    """The text up to where the response begins.

    Example:
        >>> render_prompt("alpaca", "Name a colour.").endswith("Name a colour.\\n\\n### Response:\\n")
        True
    """
    without_input, with_input = TEMPLATES[template]
    # One pass of `format`: braces in the data are text and stay as they are.
    if input_text.strip():
        return with_input.format(instruction=instruction.strip(), input=input_text.strip())
    return without_input.format(instruction=instruction.strip())
