"""Built-in prompt templates: functions that return a text with one `{context}` or, for questions, one `{question}`.

A template for masked segments has a `{right_context}` after the context.
"""

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


@PROMPT_TEMPLATES.register("next_segment")
def next_segment() -> str:
    """An instruction to predict how the text goes on, for targets "segment" (after RLPT, 2509.19249)."""
    return (
        'Continue the text under "### Context" by predicting its next sentence, or the part of its beginning that you are sure '
        "of. Think\nstep by step, then put it inside \\boxed{}. It may begin with a space: keep the space inside the box.\n\n"
        "### Context\n{context}\n"
    )


@PROMPT_TEMPLATES.register("masked_segment")
def masked_segment() -> str:
    """An instruction to predict what is missing between two texts, for segments with right context (after RLPT, 2509.19249)."""
    return (
        'A sentence is missing between the texts under "### Before" and "### After". Predict it, or the part of its beginning '
        "that you are\nsure of. Think step by step, then put it inside \\boxed{}. It may begin with a space: keep the space "
        "inside the box.\n\n### Before\n{context}\n\n### After\n{right_context}\n"
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
