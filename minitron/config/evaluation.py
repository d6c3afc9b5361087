"""The settings of an evaluation: texts whose perplexity is measured, and benchmark tasks."""

import dataclasses

from minitron.config.setting import setting
from minitron.errors import refuse


@dataclasses.dataclass(frozen=True)
class Eval:
    """Loss and perplexity of texts, and benchmark tasks of lm-eval (minitron[eval] installs it)."""

    texts: dict[str, str] = setting({}, "further texts to report loss and perplexity on, as name: source")
    seq_length: int | None = setting(None, "tokens per window of a text (null: train.seq_length)", least=2)
    stride: int | None = setting(
        None, "tokens from where a window begins to where the next does; a token counts in the first that predicts it (null: no overlap)", least=1
    )
    tokens: int = setting(65536, "tokens of each text to read", least=1)
    micro_batch_size: int = setting(4, "windows per forward pass; of a task's requests, which are shorter, as many as hold as many tokens", least=1)
    tasks: list[str] | str | None = setting(
        None, "benchmark tasks of lm-eval, by the names of tasks, tags and groups: [mmlu, hellaswag], or text with commas (null: none)"
    )
    limit: int | None = setting(None, "rows of each task to ask, the first ones (null: all)", least=1)
    num_fewshot: int | None = setting(
        None, "solved examples before each question, of tasks that are not made to have none (null: each task's own number)", least=0
    )
    max_length: int | None = setting(
        None, "tokens that tasks may use at a time: of longer questions the end is kept, texts are cut up (null: the model's positions)", least=2
    )
    task_data: str | None = setting(
        None, "folder that holds the tasks' data sets, each in a folder called as on the hub, Rowan/hellaswag (null: they come from the hub)"
    )
    include_path: str | None = setting(None, "folder with further tasks in lm-eval's YAML; one called like one of lm-eval's takes its place")

    @property
    def task_names(self) -> list[str]:
        """`tasks` as a list, each name once."""
        names = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks or []
        return list(dict.fromkeys(name.strip() for name in names))

    def __post_init__(self) -> None:
        if self.tasks is not None and not all(self.task_names):
            raise refuse("eval.tasks", self.tasks, "names of lm-eval's tasks are needed, and one is empty")
