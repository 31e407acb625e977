"""The data-set assets and the files that they are made of: other rows make another data set, the same rows the one there is."""

import json

import dagster as dg

from assets.data import prompts


def test_a_file_outside_data_is_known_by_its_content(resources, tmp_path):
    path = tmp_path / "mine.jsonl"

    def materialize(rows):
        path.write_text("".join(json.dumps({"prompt": row, "tags": ["general"]}) + "\n" for row in rows), encoding="utf-8")
        done = dg.materialize(
            [prompts],
            instance=dg.DagsterInstance.ephemeral(),
            resources=resources,
            run_config={"ops": {"prompts": {"config": {"prompts": [str(path)], "problems": []}}}},
        )
        (event,) = done.get_asset_materialization_events()
        folder = tmp_path / "artifacts" / "prompts" / done.output_for_node("prompts").fingerprint
        read = [json.loads(line) for part in ("train", "heldout") for line in (folder / f"{part}.jsonl").open(encoding="utf-8")]
        assert {row["prompt"] for row in read} == set(rows)
        return event.materialization.metadata["reused"].value

    first = [f"Question {n}?" for n in range(40)]
    other = [*first[:-1], "Question XX?"]  # as many bytes, within the same second
    assert [materialize(rows) for rows in (first, first, other, first)] == [False, True, False, True]
