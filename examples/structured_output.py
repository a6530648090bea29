"""An answer that is an object of a Pydantic model."""

from typing import Literal

from openai import OpenAI
from pydantic import BaseModel


class Word(BaseModel):
    """What a dictionary says of a word."""

    kind: Literal["noun", "verb", "adjective"]
    plural: bool


client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
answer = client.chat.completions.parse(
    model="persimmon-demo",
    messages=[{"role": "user", "content": "What is a persimmon?"}],
    response_format=Word,
    temperature=0,
)
print(repr(answer.choices[0].message.parsed))
