"""Reads a workflow as ComfyUI's canvas saves it."""


def as_prompt(workflow: dict, widgets: dict[str, list[str]]) -> dict[str, dict]:
    """What the canvas sends to be run: inputs of each node by name, a link as [node, output]. widgets: names of those
    of each type, in order, with None where the canvas adds one of its own."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        names, values = widgets[node["type"]], node["widgets_values"]
        assert len(names) == len(values), f"{node['type']}: {values} for {names}"
        given = {name: value for name, value in zip(names, values) if name is not None}
        for held in node["inputs"]:
            if held["link"] is not None:
                _, source, output, *_ = links[held["link"]]
                given[held["name"]] = [str(source), output]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": given}
    return prompt
