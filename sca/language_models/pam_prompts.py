"""Prompts of Perceive Anything (PAM, arXiv 2506.05302), those of its notebooks."""

from __future__ import annotations

TASK_PROMPTS = {  # "zh" is Chinese
    "recognition": "Classify this subject and provide its label.",
    "caption": "Provide a concise caption for this subject.",
    "explain": "Classify this subject and provide the label and its definition.",
    "detail": "Provide a comprehensive and detailed description for this subject.",
    "recognition-zh": "对该目标对象进行分类并提供标签",
    "caption-zh": "对该目标对象提供一个概括的描述",
    "explain-zh": "对该目标对象进行分类并提供标签和名词功能解释",
    "detail-zh": "对该目标对象提供一个全面且详细的描述",
}
IMAGE_TOKEN = "<image>"  # place of the visual prefix in the training data
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
PROMPT_TEMPLATE = (
    f"{TURN_START}system\nYou are a helpful assistant.{TURN_END}\n{TURN_START}user\n{{image}}\n{{prompt}}{TURN_END}\n"
    f"{TURN_START}assistant\n"
)
