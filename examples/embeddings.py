"""How alike texts are, by the cosine of their embeddings."""

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
texts = ["a sweet fruit", "a ripe fruit", "a large river"]
first, *others = [item.embedding for item in client.embeddings.create(model="persimmon-demo", input=texts).data]
for text, other in zip(texts[1:], others, strict=True):
    print(f"{text}: {sum(x * y for x, y in zip(first, other, strict=True)):.2f}")
