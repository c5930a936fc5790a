"""Built-in prompt templates: functions that return a text with one `{context}` or, for questions, one `{question}`."""

from __future__ import annotations

from rpt_jax.registry import PROMPT_TEMPLATES


@PROMPT_TEMPLATES.register("plain")
def plain() -> str:
    """The context alone."""
    return "{context}"


@PROMPT_TEMPLATES.register("v0")
def version_0() -> str:
    """An instruction modeled on the paper's template v0 (Table 10)."""
    return (
        'Continue the text under "### Context" by predicting its next token. Think step by step about which token is the '
        "most\nprobable, then put it inside \\boxed{}. The token may begin with a space: keep the space inside the box. "
        "Write the token as\nit is, without \\text{}.\n\n### Context\n{context}\n"
    )


@PROMPT_TEMPLATES.register("question")
def question() -> str:
    """The question alone."""
    return "{question}"


@PROMPT_TEMPLATES.register("boxed_answer")
def boxed_answer() -> str:
    """The question, then the instruction to reason and to box the final answer."""
    return "{question}\n\nReason step by step, and put your final answer in \\boxed{}."


@PROMPT_TEMPLATES.register("think_then_box")
def think_then_box() -> str:
    """As `boxed_answer`, for a policy that was not trained to write </think> by itself."""
    return "{question}\n\nReason step by step. Then write </think>, and after it your final answer in \\boxed{}."
