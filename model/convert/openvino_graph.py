"""Which weights of an OpenVINO graph are which of Persimmon's, by following the hidden states through it.

Knows the operations of which an exported Persimmon network consists.  Knows nothing of files, or of how weights are
compressed.

Names would not do: norms are anonymous constants, in older exports biases too, and their order in the file is not the
network's (keys' norm may come before queries').  Where weights meet the hidden states is the same in all exports that
were seen: of Transformers 4.41, 4.46 and 5.5 by optimum-intel 1.18, 1.21 and 2.2 (OpenVINO 2024.3, 2024.6 and 2026.4).
It also shows that the rows of query_key_value are in the order [head, {q, k, v}, dimension]: the graph reshapes its
output to [..., head, 3, dimension], and the norms of queries and keys follow the first and the second.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from persimmon.model.config import PersimmonConfig
from persimmon.model.convert.openvino_weights import Weight, is_weight, read_weight
from persimmon.model.errors import CheckpointError

_INPUT = "input_ids"
# Operations on the way from a projection's input back to attention that move numbers without changing them.
_MOVES = ("Convert", "Reshape", "Transpose")
_TOLERANCE = 2e-3
"""For the rotary frequencies and cosines, which may be stored in 16 bits."""


class GraphReader:
    """Follows the hidden states from the embedding to the logits.

    Args:
        model: OpenVINO's model.
        config: what config.json says of it.
        place: the graph's file, for messages.
    """

    def __init__(self, model: Any, config: PersimmonConfig, place: object) -> None:
        self._model = model
        self._config = config
        self._place = place
        self._weights: dict[str, Weight] = {}

    def weights(self) -> dict[str, Weight]:
        """The weights by their Hugging Face names.

        Raises:
            CheckpointError: an operation is not the one that Persimmon's network has in its place.
        """
        hidden = self._embedding()
        for layer in itertools.count():
            norm, added = self._hidden_state(hidden)
            if added is None:
                break
            name = f"model.layers.{layer}"
            normed = self._layer_norm(norm, f"{name}.input_layernorm")
            fused = self._linear(self._following(normed, "MatMul"), f"{name}.self_attn.query_key_value")
            self._attention(fused, f"{name}.self_attn")
            dense = self._linear_before(self._other_operand(added, hidden), f"{name}.self_attn.dense")
            self._check_attention_output(dense)
            hidden = added.output(0)
            norm, added = self._hidden_state(hidden)
            normed = self._layer_norm(norm, f"{name}.post_attention_layernorm")
            inner = self._linear(self._following(normed, "MatMul"), f"{name}.mlp.dense_h_to_4h")
            outer = self._linear(self._following(self._squared_relu(inner), "MatMul"), f"{name}.mlp.dense_4h_to_h")
            if added is None or self._other_operand(added, hidden) != outer:
                raise self._unexpected(norm, "a residual connection around the MLP")
            hidden = added.output(0)
        normed = self._layer_norm(norm, "model.final_layernorm")
        logits = self._linear(self._following(normed, "MatMul"), "lm_head", bias=False)
        self._following(logits, "Result")
        return self._weights

    def _hidden_state(self, hidden: Any) -> tuple[Any, Any]:
        """The MVN and the residual connection's Add that use a hidden state; after the last layer there is no Add."""
        nodes = self._consumers(hidden)
        norms, adds = ([node for node in nodes if node.get_type_name() == kind] for kind in ("MVN", "Add"))
        if len(norms) != 1 or len(adds) > 1 or len(norms) + len(adds) != len(nodes):
            listed = ", ".join(sorted(node.get_type_name() for node in nodes))
            raise self._unexpected(hidden.get_node(), f"its output to enter an MVN and an Add, not {listed}")
        return norms[0], next(iter(adds), None)

    def _embedding(self) -> Any:
        """The hidden states that enter the first layer."""
        inputs = [port for port in self._model.inputs if _INPUT in port.get_names()]
        if not inputs:
            raise CheckpointError(
                f"{self._place} has no input {_INPUT!r}; expected an export of a causal language model"
            )
        gathers = [node for node in self._consumers(inputs[0], "Gather") if is_weight(node.input_value(0))]
        if len(gathers) != 1 or _number(gathers[0].input_value(2)) != 0:
            raise self._unexpected(inputs[0].get_node(), "to select rows of the embedding")
        (gather,) = gathers
        self._take("model.embed_tokens.weight", gather.input_value(0))
        return gather.output(0)

    def _layer_norm(self, node: Any, name: str) -> Any:
        """The output of a LayerNorm that begins with an MVN."""
        eps = node.get_attributes()["eps"]
        if not np.isclose(eps, self._config.layer_norm_eps, rtol=1e-3):
            raise CheckpointError(
                f"{self._place}: {node.get_friendly_name()} adds {eps:.3g} to the variance, but layer_norm_eps in "
                f"config.json is {self._config.layer_norm_eps:.3g}"
            )
        scaled = self._following(node.output(0), "Multiply")
        self._take(f"{name}.weight", self._other_operand(scaled, node.output(0)))
        shifted = self._following(scaled.output(0), "Add")
        self._take(f"{name}.bias", self._other_operand(shifted, scaled.output(0)))
        return shifted.output(0)

    def _linear(self, node: Any, name: str, *, bias: bool = True) -> Any:
        """The output of a projection that begins with a MatMul."""
        attributes = node.get_attributes()
        if not is_weight(node.input_value(1)) or attributes["transpose_a"] or not attributes["transpose_b"]:
            raise self._unexpected(node, f"a MatMul with {name}.weight, transposed")
        self._take(f"{name}.weight", node.input_value(1))
        if not bias:
            return node.output(0)
        added = self._following(node.output(0), "Add")
        self._take(f"{name}.bias", self._other_operand(added, node.output(0)))
        return added.output(0)

    def _linear_before(self, output: Any, name: str) -> Any:
        """The MatMul of a projection that ends with an output."""
        added = output.get_node()
        if added.get_type_name() != "Add":
            raise self._unexpected(added, f"the bias of {name}")
        nodes = [_without_converts(added.input_value(number)).get_node() for number in range(2)]
        matmuls = [node for node in nodes if node.get_type_name() == "MatMul"]
        if len(matmuls) != 1 or self._linear(matmuls[0], name) != added.output(0):
            raise self._unexpected(added, f"the bias of {name}")
        return matmuls[0]

    def _attention(self, fused: Any, name: str) -> None:
        """Takes the norms of queries and keys; checks the order of the projection's rows, and the rotary angles."""
        config = self._config
        reshape = self._following(fused, "Reshape")
        shape = [size.get_length() if size.is_static else None for size in reshape.output(0).get_partial_shape()]
        if shape[2:] != [config.num_attention_heads, 3, config.head_dim]:
            raise self._unexpected(
                reshape, f"a Reshape to [.., {config.num_attention_heads}, 3, {config.head_dim}] (heads, qkv, head_dim)"
            )
        selected: dict[int, Any] = {}
        for gather in self._consumers(reshape.output(0), "Gather"):
            if _number(gather.input_value(2)) not in (3, -2) or (index := _number(gather.input_value(1))) is None:
                raise self._unexpected(gather, "a selection of queries, keys or values")
            selected[index % 3] = gather.output(0)
        if sorted(selected) != [0, 1, 2]:
            raise self._unexpected(reshape, "queries, keys and values to be selected from it")
        for index, part in enumerate(("q", "k")):
            output = selected[index]
            if config.qk_layernorm:
                output = self._layer_norm(self._following(output, "MVN"), f"{name}.{part}_layernorm")
            self._check_rotary(output)

    def _check_rotary(self, output: Any) -> None:
        """Raises where config.json has other rotary angles than the graph."""
        config = self._config
        if config.rope_scaling is not None:
            return
        transposed = self._following(output, "Transpose").output(0)
        parts = [transposed, *(node.output(0) for node in self._consumers(transposed, "Slice"))]
        widths = [part.get_partial_shape()[3].get_length() for part in parts]
        rotated = [part for part, width in zip(parts, widths, strict=True) if width == config.rotary_dim]
        turned = [(part, node) for part in rotated for node in self._consumers(part, "Multiply")]
        if not turned:
            raise CheckpointError(
                f"{self._place}: after {output.get_node().get_friendly_name()} not the first {config.rotary_dim} "
                f"dimensions are turned, as partial_rotary_factor {config.partial_rotary_factor} in config.json says"
            )
        frequencies = config.rope_theta ** -(np.arange(0, config.rotary_dim, 2) / config.rotary_dim)
        cosines = np.cos(np.concatenate([frequencies, frequencies]))
        for part, node in turned:
            if not any(
                table.shape == expected.shape and np.allclose(table, expected, rtol=_TOLERANCE, atol=1e-6)
                for table in self._tables(self._other_operand(node, part))
                for expected in (frequencies, cosines)
            ):
                raise CheckpointError(
                    f"{self._place}: {node.get_friendly_name()} turns queries or keys by other angles than those of "
                    f"rope_theta {config.rope_theta:g} in config.json"
                )

    def _tables(self, output: Any) -> Iterator[np.ndarray[Any, Any]]:
        """The constants that rotary angles are made of: frequencies, or the second row of a table for all positions."""
        pending, seen = [output], set()
        while pending:
            node = pending.pop().get_node()
            if node.get_instance_id() in seen:
                continue
            seen.add(node.get_instance_id())
            if node.get_type_name() == "Constant":
                if node.get_element_type().is_real() and max(node.get_output_shape(0), default=0) > 1:
                    weight = read_weight(node.output(0), self._place)
                    of_positions = math.prod(weight.shape[1:]) > 1
                    rows = weight.rows(1, 2) if of_positions else weight.rows(0, weight.shape[0])
                    yield rows.float().numpy().reshape(-1)
            elif node.get_type_name() != "Parameter":
                pending += [node.input_value(number) for number in range(node.get_input_size())]

    def _squared_relu(self, output: Any) -> Any:
        relu = self._following(output, "Relu").output(0)
        squared = self._following(relu, "Power", "Multiply")
        power = squared.get_type_name() == "Power"
        if power and _number(squared.input_value(1)) == 2:
            return squared.output(0)
        if not power and all(_without_converts(squared.input_value(number)) == relu for number in range(2)):
            return squared.output(0)
        raise self._unexpected(squared, "the square of its input")

    def _check_attention_output(self, dense: Any) -> None:
        """Raises where something stands between attention and its output projection, like a scaling of AWQ."""
        node = dense.input_value(0).get_node()
        while node.get_type_name() in _MOVES:
            node = node.input_value(0).get_node()
        if node.get_type_name() not in ("ScaledDotProductAttention", "MatMul"):
            raise self._unexpected(node, "attention's output")

    def _take(self, name: str, output: Any) -> None:
        if not is_weight(output):
            raise self._unexpected(output.get_node(), name)
        self._weights[name] = read_weight(output, self._place)

    def _following(self, output: Any, *kinds: str) -> Any:
        """The one operation that uses an output, which has to be of one of the kinds."""
        nodes = self._consumers(output)
        if len(nodes) != 1 or nodes[0].get_type_name() not in kinds:
            listed = ", ".join(sorted(node.get_type_name() for node in nodes)) or "nothing"
            raise self._unexpected(output.get_node(), f"its output to enter one {' or '.join(kinds)}, not {listed}")
        return nodes[0]

    def _consumers(self, output: Any, *kinds: str) -> list[Any]:
        """The operations that use an output, of some kinds or of any but ShapeOf, whatever type it is converted to."""
        nodes: dict[int, Any] = {}
        for port in output.get_target_inputs():
            node = port.get_node()
            if node.get_type_name() == "Convert":
                nodes |= {found.get_instance_id(): found for found in self._consumers(node.output(0), *kinds)}
            elif node.get_type_name() in kinds or (not kinds and node.get_type_name() != "ShapeOf"):
                nodes[node.get_instance_id()] = node
        return list(nodes.values())

    def _other_operand(self, node: Any, known: Any) -> Any:
        """The operand of an operation that is not the known one."""
        first, second = (_without_converts(node.input_value(number)) for number in range(2))
        known = _without_converts(known)
        if (first == known) == (second == known):
            raise self._unexpected(node, "two operands, of which one is the hidden state")
        return second if first == known else first

    def _unexpected(self, node: Any, needed: str) -> CheckpointError:
        """What to raise for a node that is not as it is in Persimmon's network."""
        return CheckpointError(
            f"{self._place}: {node.get_type_name()} {node.get_friendly_name()} is not as in Persimmon's network; "
            f"expected {needed}"
        )


def _without_converts(output: Any) -> Any:
    while output.get_node().get_type_name() == "Convert":
        output = output.get_node().input_value(0)
    return output


def _number(output: Any) -> int | None:
    """The value of a scalar constant that is a whole number; None for others."""
    node = _without_converts(output).get_node()
    if node.get_type_name() != "Constant" or node.get_byte_size() > 8 or node.get_element_type().get_bitwidth() < 8:
        return None
    values = node.get_vector()
    return int(values[0]) if len(values) == 1 and int(values[0]) == values[0] else None
