"""What there is to learn from a table of texts, by name."""

from __future__ import annotations

from bara.data.multi_label_task import MultiLabelTask
from bara.data.question_task import QuestionTask
from bara.data.tag_task import TagTask
from bara.data.text_task import TextTask

TableTask = TextTask | TagTask | QuestionTask
TABLE_TASKS: dict[str, type[TextTask] | type[TagTask] | type[QuestionTask]] = {
    "classification": TextTask,
    "regression": TextTask,
    "multi-label": MultiLabelTask,
    "token-classification": TagTask,
    "question-answering": QuestionTask,
}
