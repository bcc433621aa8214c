"""The nodes in ComfyUI's V3 form. Imports `comfy_api.latest`."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

from draftdiff.integrations.comfyui.nodes import CATEGORY, NODES, Input, Node

_KINDS = {
    "MODEL": io.Model,
    "LATENT": io.Latent,
    "FLOAT": io.Float,
    "INT": io.Int,
    "STRING": io.String,
    "COMBO": io.Combo,
}


def _input(given: Input) -> Any:
    return _KINDS[given.kind].Input(given.name, **given.options)


def _node(node: Node) -> type:
    def define_schema(cls: Any) -> Any:
        return io.Schema(
            node_id=node.node_id,
            display_name=node.display_name,
            category=CATEGORY,
            description=node.description,
            inputs=[_input(given) for given in node.inputs],
            outputs=[_KINDS[kind].Output(display_name=name) for kind, name in node.outputs],
            is_output_node=node.is_output,
        )

    def execute(cls: Any, **given: Any) -> Any:
        results = node.execute(**given)
        return io.NodeOutput(*results, ui=ui.PreviewText(results[-1])) if node.is_output else io.NodeOutput(*results)

    members: dict[str, Any] = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    return type(node.node_id, (io.ComfyNode,), members)


class DraftdiffExtension(ComfyExtension):
    async def get_node_list(self) -> list[type]:
        return [_node(node) for node in NODES]


async def comfy_entrypoint() -> ComfyExtension:
    return DraftdiffExtension()
