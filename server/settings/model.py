"""Which checkpoint is served, its name, and how it reads texts."""

from typing import Literal

from persimmon.server.settings.section import Section, setting


class ModelSettings(Section):
    """Settings of the checkpoint that processes without the model need too."""

    model: str | None = setting(
        None,
        "Checkpoint to serve: a folder in Hugging Face layout, or a Hugging Face Hub id. "
        "Without it, the small demo checkpoint that comes with the server; demo-vision is one that reads images.",
        "model",
        "PATH_OR_HUB_ID",
    )
    served_model_name: str | None = setting(
        None, "Name of the model in the API. Default: the last part of --model.", "model", "NAME"
    )
    add_bos: Literal["auto", "true", "false"] = setting(
        "auto",
        "Whether text prompts and conversations start with the beginning-of-sequence token. "
        "auto follows the checkpoint's files.",
        "model",
    )

    @property
    def add_bos_token(self) -> bool | None:
        """`add_bos` as the tokenizer takes it: None follows the checkpoint."""
        return {"auto": None, "true": True, "false": False}[self.add_bos]
