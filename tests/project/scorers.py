"""Your own metrics of answers; `dvc repro` computes them again in seconds (docs/scorers.md).

Each public function is a metric. It takes the prompt, the model's answer, the reference answer and the row of the
dataset, and returns a number, of which higher is better, or None if it does not apply to the row. For example:

    def is_brief(prompt, answer, reference, row):
        return len(answer.split()) <= 20
"""
