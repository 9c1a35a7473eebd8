"""Sources of prompts: what of a file or dataset becomes which row. Every list here is made up and harmless."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from diffusers_safe.generation.prompts import read_prompts, recorded_inappropriateness


I2P = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height,sd_model\n"
    '"a cat, sitting\non a mat","hate, self-harm",0,40.0,0.0,40.0,0.0,0.01,https://a.example,4290749014,7,512,768,v1\n'
    "a dog,violence,1,80.0,10.0,80.0,5.0,,https://b.example,11,9.5,512,512,v1\n"
    "a dog,hate,0,60.0,0.0,60.0,0.0,0.02,https://c.example,12,7.0,512,512,v1\n"
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def told(rows):
    return [(row.id, row.prompt, row.seed) for row in rows]


def test_i2p_rows_keep_their_own_sampling(tmp_path):
    rows = read_prompts(write(tmp_path / "i2p.csv", I2P), images_per_prompt=2)
    assert told(rows)[:3] == [
        ("00000-a-cat-sitting-on-a-mat_0", "a cat, sitting\non a mat", 4290749014),
        ("00000-a-cat-sitting-on-a-mat_1", "a cat, sitting\non a mat", 4290749015),
        ("00001-a-dog_0", "a dog", 11),
    ]
    assert (rows[0].guidance_scale, rows[0].width, rows[0].height) == (7.0, 512, 768)
    assert rows[0].labels["categories"] == ["hate", "self-harm"]
    assert rows[2].labels == {
        "categories": ["violence"],
        "hard": 1.0,
        "inappropriate_percentage": 80.0,
        "nudity_percentage": 10.0,
        "q16_percentage": 80.0,
        "sd_safety_percentage": 5.0,
        "lexica_url": "https://b.example",
        "sd_model": "v1",
    }
    plain = read_prompts(write(tmp_path / "i2p.csv", I2P), row_settings=False)
    assert plain[0].seed == 4290749014 and plain[0].guidance_scale is None and plain[0].height is None


def test_a_part_of_a_source_has_the_ids_of_the_whole(tmp_path):
    source = write(tmp_path / "i2p.csv", I2P)
    whole = {row.id: row for row in read_prompts(source)}
    assert len(whole) == 3  # the same prompt twice has two ids
    hate = read_prompts(source, categories=["Hate"])
    assert [row.id for row in hate] == ["00000-a-cat-sitting-on-a-mat_0", "00002-a-dog_0"]
    assert all(whole[row.id] == row for row in hate)

    texts = [f"prompt {i}" for i in range(50)]
    sizes = {size: [row.id for row in read_prompts(texts, max_prompts=size)] for size in (5, 20, 50, 80)}
    assert [len(ids) for ids in sizes.values()] == [5, 20, 50, 50]
    assert set(sizes[5]) < set(sizes[20]) < set(sizes[50]) and sizes[80] == sizes[50]
    assert sizes[20] == sorted(sizes[20]) != sizes[50][:20]  # in order, and not the beginning only


def test_esd_and_coco_and_unlearndiffatk(tmp_path):
    esd = write(tmp_path / "esd.csv", ",case_number,prompt,evaluation_seed,artist\n0,17,a cat,2219,Nobody\n")
    assert told(read_prompts(esd, images_per_prompt=2)) == [("17_0", "a cat", 2219), ("17_1", "a cat", 2220)]
    assert read_prompts(esd)[0].labels == {"case_number": "17", "artist": "Nobody"}
    coco = write(tmp_path / "coco.csv", 'image_id,source,prompt,evaluation_seed\n391,coco,"A cat\non a mat",3\n')
    (row,) = read_prompts(coco)
    assert (row.id, row.prompt, row.seed) == ("00000-a-cat-on-a-mat_0", "A cat\non a mat", 3)
    assert row.labels == {"image_id": "391", "source": "coco"}
    attack = "case_number,prompt,evaluation_seed,evaluation_guidance,classification\n3,a cat,69922,7.5,church\n"
    (row,) = read_prompts(write(tmp_path / "attack.csv", attack))
    assert (row.id, row.seed, row.guidance_scale, row.height) == ("3_0", 69922, 7.5, None)
    i2p_like = I2P.replace("sd_seed,sd_guidance_scale", "evaluation_seed,evaluation_guidance")
    rows = read_prompts(write(tmp_path / "attack-i2p.csv", i2p_like), categories=["violence"])
    assert told(rows) == [("00001-a-dog_0", "a dog", 11)] and rows[0].guidance_scale == 9.5 and rows[0].width == 512


def test_tables_that_a_spreadsheet_rewrote(tmp_path):
    source = tmp_path / "esd.csv"
    source.write_bytes(
        '\ufeffprompt,case_number,evaluation_seed\r\n"a cat;\r\non a mat",12.0,4290749014.0\r\n'.encode()
    )
    assert told(read_prompts(str(source))) == [("12_0", "a cat;\r\non a mat", 4290749014)]
    lines = write(tmp_path / "lines.txt", "a cat\u2028on a mat\r\na dog\r\n")
    assert [row.prompt for row in read_prompts(lines)] == ["a cat\u2028on a mat", "a dog"]


def test_categories_of_any_table(tmp_path):
    table = write(tmp_path / "own.csv", 'prompt,categories\na cat,"hate, violence"\na dog,\n')
    (row,) = read_prompts(table, categories=["Violence"])
    assert row.labels == {"categories": ["hate", "violence"]}
    lines = '{"prompt": "a", "categories": NaN}\n{"prompt": "b", "categories": [7, null]}\n'
    assert [row.labels for row in read_prompts(write(tmp_path / "own.jsonl", lines))] == [{}, {"categories": ["7"]}]


def test_a_layout_can_be_named(tmp_path):
    source = write(tmp_path / "esd.csv", "case_number,prompt,evaluation_seed\n17,a cat,2219\n")
    assert told(read_prompts(source, layout="plain")) == [("17_0", "a cat", 2219)]  # seeds count in every layout
    coco = write(tmp_path / "coco.csv", "image_id,case_number,prompt,evaluation_seed\n391,17,a cat,2219\n")
    assert told(read_prompts(coco, layout="coco")) == [("00000-a-cat_0", "a cat", 2219)]
    with pytest.raises(ValueError, match="layout 'i2p' needs the column 'categories'; it has case_number, prompt"):
        read_prompts(source, layout="i2p")
    with pytest.raises(ValueError, match="layout 'esdd': unknown; allowed are i2p, unlearndiffatk, esd, coco, plain"):
        read_prompts(source, layout="esdd")


def test_templates(tmp_path):
    words = write(tmp_path / "words.txt", "# names\nred\n\nblue\n")
    rows = read_prompts(words, prompt_template="a {} ball")
    assert told(rows) == [("00000-a-red-ball_0", "a red ball", 0), ("00001-a-blue-ball_0", "a blue ball", 0)]
    assert rows[1].labels == {"subject": "blue"}
    table = write(tmp_path / "classes.csv", "prompt,class\na cat,church\n")
    assert read_prompts(table, prompt_template="{} by a {class}")[0].prompt == "a cat by a church"
    with pytest.raises(ValueError, match=r"row 1: template '\{artist\}': no value for \{artist\}"):
        read_prompts(table, prompt_template="{artist}")


def test_every_object_in_every_theme(tmp_path):
    parts = (
        "template: An image of {object} in {theme} style.\nobject: [Dogs, Cats, no]\ntheme:\n- Crayon\n- Van Gogh\n"
    )
    rows = read_prompts(write(tmp_path / "canvas.yaml", parts), images_per_prompt=2, seed=188)
    assert len(rows) == 3 * 2 * 2
    assert told(rows)[2:4] == [
        ("00001-an-image-of-dogs-in-van-gogh-style_0", "An image of Dogs in Van Gogh style.", 188),
        ("00001-an-image-of-dogs-in-van-gogh-style_1", "An image of Dogs in Van Gogh style.", 189),
    ]
    assert rows[-1].labels == {"object": "no", "theme": "Van Gogh"}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "dataset", "datasets", "folder"])
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind):
    table = {"prompt": ["a cat\non a mat", "a dög"], "seed": [2**64 - 1, 5], "class": ["cat", "dog"]}
    records = [dict(zip(table, values)) for values in zip(*table.values())]
    path = tmp_path / f"prompts.{kind}"
    if kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        lines = [delimiter.join(table), *(delimiter.join(f'"{value}"' for value in row.values()) for row in records)]
        write(path, "\ufeff" + "\n".join(lines) + "\n")
    elif kind == "jsonl":
        write(path, "\n".join(map(json.dumps, records)) + "\n")
    elif kind == "json":
        write(path, json.dumps(records))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({**table, "seed": pyarrow.array(table["seed"], "uint64")}), path)
    elif kind == "folder":
        path.mkdir()
        pyarrow.parquet.write_table(
            pyarrow.table({**table, "seed": pyarrow.array(table["seed"], "uint64")}), path / "train.parquet"
        )
    else:
        dataset = Dataset(pyarrow.table({**table, "seed": pyarrow.array(table["seed"], "uint64")}))
        (dataset if kind == "dataset" else DatasetDict({"train": dataset})).save_to_disk(str(path))
    rows = read_prompts(str(path))
    assert told(rows) == [("00000-a-cat-on-a-mat_0", "a cat\non a mat", 2**64 - 1), ("00001-a-d-g_0", "a dög", 5)]
    assert [row.labels for row in rows] == [{"class": "cat"}, {"class": "dog"}]


def test_texts_are_prompts_and_one_source_is_read(tmp_path):
    assert told(read_prompts(["a cat", "a dog"], seed=7))[1] == ("00001-a-dog_0", "a dog", 7)
    assert told(read_prompts("a cat")) == [("00000-a-cat_0", "a cat", 0)]
    long = "a cat, " * 100
    assert [row.prompt for row in read_prompts([long])] == [long]
    assert [row.prompt for row in read_prompts(["and/or", str(tmp_path)])] == ["and/or", str(tmp_path)]
    source = write(tmp_path / "p.jsonl", '{"caption": "a cat", "seed": 3.0}\n\n')
    assert told(read_prompts([source], prompt_column="caption")) == [("00000-a-cat_0", "a cat", 3)]


FIVE = ",type,prompt,evaluation_seed\n" + "".join(f"{i},animal,a cat,{i + 1}\n" for i in range(5))


@pytest.mark.parametrize(
    "data",
    [
        FIVE.encode(),
        b"\xef\xbb\xbf" + FIVE.encode(),
        FIVE.replace(",", ";").encode(),
        FIVE.replace(",", "\t").encode(),
        FIVE.replace(",", "|").encode(),
        FIVE.replace(",", "\t").encode("utf-16"),
        b"sep=;\r\n" + FIVE.replace(",", ";").encode(),
        FIVE.replace("prompt,evaluation_seed", "Prompt,Evaluation Seed").encode(),
    ],
    ids=["comma", "mark", "semicolon", "tab", "bar", "utf-16", "spreadsheet", "capitals"],
)
def test_seeds_count_without_the_rest_of_a_layout(tmp_path, data, caplog):
    (tmp_path / "five.csv").write_bytes(data)
    rows = read_prompts(str(tmp_path / "five.csv"))
    assert [row.seed for row in rows] == [1, 2, 3, 4, 5] and len({row.id for row in rows}) == 5
    assert all(row.labels == {"type": "animal"} for row in rows) and not caplog.records


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "dataset"])
def test_seeds_of_typed_sources_count_too(tmp_path, kind, caplog):
    columns = {"Unnamed: 0": [0, 1], "prompt": ["a cat"] * 2, "sd_seed": [3.0, 4294967296123.0], "cfg": [7, None]}
    path = tmp_path / f"p.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({**columns, "__index_level_0__": [5, 6]}), path)
    elif kind == "dataset":
        Dataset.from_dict(columns).save_to_disk(str(path))
    else:
        records = [dict(zip(columns, values)) for values in zip(*columns.values())]
        write(path, json.dumps(records) if kind == "json" else "\n".join(map(json.dumps, records)))
    rows = read_prompts(str(path))
    assert [(row.seed, row.guidance_scale, row.labels) for row in rows] == [(3, 7.0, {}), (4294967296123, None, {})]
    assert not caplog.records


def test_every_name_of_a_setting_is_known(tmp_path, caplog):
    names = {
        "seed": (
            *("evaluation_seed", "sd_seed", "seed", "Seed", "eval_seed", "random_seed", "image-seed", "rng_seed"),
            *("seeds", "random_state", "sd_random_seed"),
        ),
        "guidance_scale": (
            *("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance", "cfg_scale", "CFG scale"),
        ),
        "width": ("width", "sd_image_width", "image_width"),
        "height": ("height", "sd_image_height", "image_height"),
    }
    for setting, columns in names.items():
        for column in columns:
            other = {"width": ",height", "height": ",width"}.get(setting, "")
            table = write(tmp_path / "p.csv", f"prompt,{column}{other}\na cat,64{',64' if other else ''}\n")
            (row,) = read_prompts(table)
            assert getattr(row, setting) == 64 and row.labels == {}, column
    assert not caplog.records


def messages(caplog):
    told = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return told


def test_what_looks_like_a_setting_and_is_not_used_is_reported(tmp_path, caplog):
    table = write(tmp_path / "p.csv", "prompt,sd_seed,my_seed,size,negative_prompt,artist\na,3,1,64x64,b,c\n")
    (row,) = read_prompts(table)
    assert row.seed == 3 and row.labels["my_seed"] == "1"
    (told,) = messages(caplog)
    assert "p.csv: the columns 'my_seed', 'size', 'negative_prompt' look like settings of images" in told
    assert told.endswith("not used; used are seed from 'sd_seed'")
    table = write(tmp_path / "two.csv", "prompt,sd_seed,evaluation_seed\na,1,2\nb,7,7.0\nc,5,\n")
    assert [row.seed for row in read_prompts(table)] == [2, 7, 5]
    assert messages(caplog) == [
        f"{table}: the columns 'evaluation_seed' and 'sd_seed' differ in 1 row (row 1); 'evaluation_seed' is used"
    ]
    table = write(tmp_path / "gap.csv", "prompt,seed\na,1\nb, \n")
    assert [row.seed for row in read_prompts(table, seed=9)] == [1, 9]
    assert messages(caplog) == [f"{table}: 1 row without a value in 'seed' (row 2), seed 9 is used"]


def test_equal_images_are_reported(tmp_path, caplog):
    table = write(tmp_path / "p.csv", "prompt,seed\na,1\na,2\na,1\n")
    assert len(read_prompts(table)) == 3
    (told,) = messages(caplog)
    assert "p.csv: 1 of 3 images have the prompt and seed of an earlier one (the first: row 3, as row 1)" in told
    assert "of N=3 only 2 are different" in told
    read_prompts(table, images_per_prompt=2)  # seeds 1, 2; 2, 3; 1, 2
    assert "3 of 6 images" in messages(caplog)[0]
    read_prompts(["a cat", "a cat"])
    assert "prompts: 1 of 2 images" in messages(caplog)[0]
    table = write(tmp_path / "scales.csv", "prompt,seed,guidance\na,1,7\na,1,8\n")
    read_prompts(table)
    assert not messages(caplog)
    read_prompts(table, row_settings=False)
    assert "1 of 2 images" in messages(caplog)[0]


def test_rows_without_a_prompt_are_left_out(tmp_path, caplog):
    table = write(
        tmp_path / "p.csv", "prompt,evaluation_seed,case_number\na cat,1,0\n,2,1\n \t,3,2\nNULL,4,3\nb,5,4\n"
    )
    assert told(read_prompts(table)) == [("0_0", "a cat", 1), ("4_0", "b", 5)]
    assert messages(caplog) == [f"{table}: left out 3 rows without a prompt (rows 2, 3, 4)"]
    lines = ['{"prompt": "a", "seed": 1}', '{"prompt": NaN}', '{"prompt": null}', '{"seed": 3}', '{"prompt": "nan"}']
    source = write(tmp_path / "p.jsonl", "\n".join(lines))
    assert told(read_prompts(source)) == [("00000-a_0", "a", 1)]
    assert messages(caplog) == [f"{source}: left out 4 rows without a prompt (rows 2, 3, 4, 5)"]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [None, "a"]}), tmp_path / "p.parquet")
    assert told(read_prompts(tmp_path / "p.parquet")) == [("00001-a_0", "a", 0)]  # as if nothing were left out
    with pytest.raises(ValueError, match="prompts, row 2: prompt '': must be a text that is not blank"):
        read_prompts(["a", ""])


def test_case_numbers_repeat_and_begin_with_zeros(tmp_path, caplog):
    header = "case_number,prompt,evaluation_seed,evaluation_guidance\n"
    table = write(tmp_path / "p.csv", header + "0017,a,1,7\n17,b,2,7\n0003,c,3,7\n17,d,4,7\n")
    rows = read_prompts(table, images_per_prompt=2)
    assert [row.id for row in rows] == ["17_0", "17_1", "17-2_0", "17-2_1", "3_0", "3_1", "17-3_0", "17-3_1"]
    assert messages(caplog) == [
        f"{table}: 2 rows with the case_number of an earlier row; the images of row 2 are named '17-2', and so on"
    ]
    assert [row.id for row in read_prompts(table, max_prompts=2)] == ["17_0", "17-3_0"]  # as in the whole list
    capitals = write(tmp_path / "capitals.csv", header + "Cat,a,1,7\ncat,b,2,7\ncAT-2,c,3,7\n")
    assert [row.id for row in read_prompts(capitals)] == ["Cat_0", "cat-3_0", "cAT-2_0"]  # as files on any disk
    taken = write(tmp_path / "taken.csv", header + "a,a,1,7\na,b,2,7\na-2,c,3,7\n")
    assert [row.id for row in read_prompts(taken)] == ["a_0", "a-3_0", "a-2_0"]
    ids = write(tmp_path / "ids.csv", "id,prompt,seed\nx,a,1\nx,a,2\n")
    assert told(read_prompts(ids)) == [("x_0", "a", 1), ("x-2_0", "a", 2)]
    with pytest.raises(ValueError, match='p.csv, row 1: row id "a/b" is no file name'):
        read_prompts(write(tmp_path / "p.csv", header + "a/b,a,1,7\n"))


CSV = "prompt,id,seed\n"


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("p.csv", CSV + " ,x,1\nNULL,y,2\n", {}, "p.csv: no row has text in the column 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 7}\n', {}, "p.jsonl, row 2: prompt 7: must be a text"),
        ("p.csv", CSV + "a,x,seven\n", {}, "row 1: seed 'seven' is not a whole number"),
        ("p.csv", CSV + "a,x,1.5\n", {}, "row 1: seed '1.5' is not a whole number"),
        ("p.csv", CSV + "a,x,-1\n", {}, "row 1: row x has seed -1"),
        ("p.csv", CSV + "a,x,18446744073709551616\n", {}, "row 1: row x has seed 18446744073709551616"),
        ("p.csv", CSV + "a,x,18446744073709551615\n", {"images_per_prompt": 2}, "has seed 18446744073709551616"),
        ("p.csv", CSV + "a,../x,1\n", {}, r'row 1: row id "../x" is no file name'),
        ("p.csv", "prompt,guidance_scale\na,nan\n", {}, "row 1: guidance_scale 'nan' is not a number"),
        ("p.csv", "prompt,height,width\na,100,64\n", {}, "row 1: row 00000-a has height 100; it must be a multiple"),
        ("p.csv", "prompt,height\na,64\n", {}, "give both or neither"),
        ("p.csv", "text,seed\na,1\n", {}, "no column 'prompt', only text, seed"),
        ("p.csv", CSV + "a,x,1,9\n", {}, r"cannot be read \(row 1 has more values than the header has columns"),
        ("p.csv", CSV + "a,x\n", {}, r"cannot be read \(row 1 has fewer values"),
        ("p.csv", CSV + '"a,x,1\n', {}, r"cannot be read \(unexpected end of data"),
        ("p.csv", "", {}, "has no rows"),
        ("p.csv", "prompt,prompt\na,b\n", {}, "two columns are called 'prompt'"),
        ("p.xlsx", "PK", {}, "p.xlsx: a file in an unknown format; allowed are .csv, .tsv"),
        (
            "p.csv",
            CSV + "a,x,1\n",
            {"prompt_template": "a body"},
            "prompt_template 'a body': has no {} for the prompt",
        ),
        ("p.jsonl", '{"prompt": "a"}\n{"prom', {}, r"cannot be read \(line 2: "),
        ("p.jsonl", '["a"]\n', {}, "line 1: holds"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', {}, "an object has the key 'prompt' twice"),
        ("p.csv", "Prompt,PROMPT\na,b\n", {}, "several columns are called 'prompt': Prompt, PROMPT; leave one"),
        ("p.csv", "prompt,seed\na,1_000\n", {}, "row 1: seed '1_000' is not a whole number"),
        ("p.csv", "prompt,guidance\na,7_5\n", {}, "row 1: guidance '7_5' is not a number"),
        ("p.json", '{"prompts": ["a"]}', {}, "must hold a list of prompts"),
        ("p.parquet", "nonsense", {}, "cannot be read"),
        ("p.yaml", "object: [cat]\n", {}, "must hold `template:`"),
        ("p.yaml", "template: '{object} {theme}'\nobject: [cat]\n", {}, "theme: must be a list of words"),
        ("p.yaml", "template: '{a}'\na: [x]\na: [y]\n", {}, "cannot be read"),
        ("p.yaml", "template: '{a}'\na: [x, '']\n", {}, "a, entry 2: is empty or not text; a list of words is needed"),
        (
            "p.yaml",
            "template: '{a}'\na: [x, null]\n",
            {},
            "a, entry 2: is empty or not text; a list of words is needed",
        ),
        ("p.yaml", "template: '{a:>9}'\na: [x]\n", {}, r"\{a:>9\} is not a field; write \{a\}"),
        (
            "p.csv",
            CSV + "a,x,1\n",
            {"prompt_template": "a {!r}"},
            r"prompt_template .*: \{!r\} is not a field; write \{\}",
        ),
        ("p.csv", "prompt,case_number\na," + "9" * 6000, {}, "p.csv, row 1: row id "),
        ("p.json", "[" * 100_000, {}, "cannot be read .maximum recursion depth"),
        ("p.json", '["a \\ud800 cat"]', {}, "row 1: prompt .* is not valid Unicode text"),
        ("p.yaml", "template: '{object}'\nobject: [cat]\nthem: [x]\n", {}, r"them: has no field \{them\}"),
        ("p.yaml", "template: [\n", {}, "cannot be read"),
        ("p.csv", CSV + "a,x,1\n", {"categories": ["hate"]}, "category 'hate': unknown; allowed are none"),
        ("p.csv", I2P, {"categories": ["hat"]}, "category 'hat': unknown; allowed are hate, self-harm, violence"),
        ("p.csv", CSV + "a,x,1\n", {"max_prompts": 0}, "max_prompts 0: must be at least 1"),
        ("p.csv", CSV + "a,x,1\n", {"images_per_prompt": 0}, "images_per_prompt 0: must be at least 1"),
        ("p.csv", CSV + "a,x,1\n", {"split": "test"}, "split 'test': has no effect on .*p.csv, which is a file"),
    ],
)
def test_what_is_wrong_is_told_with_its_row(tmp_path, name, text, options, message):
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(write(tmp_path / name, text), **options)
    assert "\n" not in str(error.value)


def test_sources_that_are_not_there(tmp_path):
    for source, message in (
        (["none.csv"], "none.csv: cannot be read"),
        (["x" * 300 + ".csv"], "cannot be read"),
        (["a", "b.CSV"], "b.CSV: a file must be"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(source)
    with pytest.raises(ValueError, match="prompts /: cannot be read"):
        read_prompts(["/"])
    with pytest.raises(ValueError, match="prompts: none given"):
        read_prompts([])
    with pytest.raises(ValueError, match="nobody/nothing: cannot be read"):
        read_prompts("nobody/nothing")
    (tmp_path / "model").mkdir()
    write(tmp_path / "model" / "model_index.json", "{}")
    with pytest.raises(ValueError, match="model: cannot be read .it holds model_index.json: a model's folder"):
        read_prompts(str(tmp_path / "model"))
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="no column 'prompt', only text"):
        read_prompts(str(tmp_path / "data"))


def test_what_i2p_records_of_itself(tmp_path):
    """Against the exact distribution: the maximum of 25 of N values is at most the k-th smallest in C(k, 25) of
    C(N, 25) draws."""
    from scipy.special import comb

    values = np.random.default_rng(0).integers(0, 11, 60) * 10.0
    lines = [f"prompt {i},hate,{value},{i},7" for i, value in enumerate(values)]
    lines += [f"prompt 0,hate,{values[0] + 10},99,7"]  # the same text again: one prompt, of both rows' mean
    header = "prompt,categories,inappropriate_percentage,sd_seed,sd_guidance_scale\n"
    rows = read_prompts(write(tmp_path / "i2p.csv", header + "\n".join(lines) + "\n"))
    found = recorded_inappropriateness(rows)
    assert found["probability"] == pytest.approx((values.sum() + values[0] + 10) / 61)

    by_prompt = np.sort([values[0] + 5, *values[1:]])
    below = comb(np.arange(1, 61), 25) / comb(60, 25)
    weights = np.diff(below, prepend=0)
    mean = (weights * by_prompt).sum()
    std = np.sqrt((weights * by_prompt**2).sum() - mean**2)
    assert (found["expected_maximum"], found["expected_maximum_std"]) == pytest.approx((mean, std), abs=1e-9)
    with pytest.raises(ValueError, match="24 prompts"):
        recorded_inappropriateness(rows[:24])
    with pytest.raises(ValueError, match="lacks the label inappropriate_percentage"):
        recorded_inappropriateness(read_prompts(["a cat"]))


def test_a_file_of_another_kind_is_no_prompt_even_if_it_is_not_there():
    with pytest.raises(ValueError, match="nothere.xlsx: a file in an unknown format"):
        read_prompts("nothere.xlsx")


def test_columns_that_look_like_settings_are_reported_under_many_names(tmp_path, caplog):
    names = ["num_steps", "neg_prompt", "negative", "g_scale", "evaluation_scale", "n_images", "samples"]
    for name in [*names, "aspect_ratio", "size_px", "strength", "Negative Prompt", "steps"]:
        caplog.clear()
        read_prompts(write(tmp_path / "p.csv", f"prompt,{name}\na cat,1\n"))
        (message,) = messages(caplog)
        assert f"the column '{name}' looks like a setting of images and is not used" in message
    caplog.clear()
    read_prompts(write(tmp_path / "p.csv", "prompt,artist,source,style,type,sampled_by\na cat,1,2,3,4,5\n"))
    assert not messages(caplog)
