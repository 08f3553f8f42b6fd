"""Images and questions to answers: TokenFlow as the vision tower of transformers' own LLaVA (Sec. 3.4)."""

from tokenflow.understanding.ask import Conversation, ask
from tokenflow.understanding.llava import (
    TEMPLATES,
    assemble,
    assemble_continuous,
    chat_template,
    load,
    make_processor,
)

__all__ = [
    "TEMPLATES",
    "Conversation",
    "ask",
    "assemble",
    "assemble_continuous",
    "chat_template",
    "load",
    "make_processor",
]
