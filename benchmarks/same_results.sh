#!/bin/sh
# Prints hashes of what short runs of every command write: the same before and after a change of structure, on one
# machine. About 5 minutes on 2 cores.
#   sh benchmarks/same_results.sh runs/before > before.txt
set -e
OUT=$1
mkdir -p "$OUT"
export OMP_NUM_THREADS=1
SHORT="--max_train_steps 6 --train_batch_size 2 --num_inference_steps 6 --checkpointing_steps 0"

erase() {  # NAME SCRIPT OPTIONS...: the hash of what was trained
    name=$1 script=$2
    shift 2
    python "$script" "$@" $SHORT --output_dir "$OUT/$name" --overwrite > "$OUT/$name.log" 2>&1 || cat "$OUT/$name.log"
    for file in "$OUT/$name/unet/diffusion_pytorch_model.safetensors" "$OUT/$name"/*.safetensors; do
        if [ -f "$file" ]; then
            python -c "
import sys
from safetensors import safe_open
import hashlib, numpy
with safe_open(sys.argv[1], 'np') as file:
    digest = hashlib.sha256(b''.join(key.encode() + file.get_tensor(key).tobytes() for key in sorted(file.keys())))
print(digest.hexdigest()[:16], sys.argv[2])" "$file" "$name/$(basename "$file")"
        fi
    done
}

for recipe in emoji-cat-sdd emoji-sketch-sdd emoji-weapon-sdd; do
    erase $recipe train_sdd.py --config examples/$recipe.yaml --trajectory_pool 56 --latents_per_trajectory 2
done
for recipe in emoji-cat-esd-x emoji-sketch-esd-u emoji-weapon-esd-x; do
    erase $recipe train_esd.py --config examples/$recipe.yaml --trajectory_pool 56 --latents_per_trajectory 2
done
EMOJI="--pretrained_model_name_or_path emoji"
erase sdd-plain train_sdd.py $EMOJI --concepts knife gun --retain_prompts "a cat" "a dog"
erase sdd-away train_sdd.py $EMOJI --concepts knife --negative_guidance_scale 1 --concept_schedule random
erase sdd-lora train_sdd.py $EMOJI --concepts knife --rank 4 --save lora --train_method full
erase esd-lora train_esd.py $EMOJI --concepts knife --rank 2 --save both --mixed_precision bf16
erase esd-2025 train_esd.py $EMOJI --concepts "in sketch style" --preset esd-2025 --save both --train_method esd-u
erase esd-from train_esd.py $EMOJI --concepts cat --erase_from "an animal" --loss_space velocity
python -m diffusers_safe.emoji.dataset --num_images 40 --output_dir "$OUT/data" --overwrite > "$OUT/data.log" 2>&1
erase student train_distill.py --config examples/emoji-student.yaml --train_data_dir "$OUT/data" --lr_warmup_steps 0 \
    --validation_prompts "a cat"
erase student-sdd train_distill.py $EMOJI --student bk-tiny --train_data_dir "$OUT/data" --caption_column caption \
    --forbidden_concepts knife --sdd_weight 0.5 --snr_gamma 5 --use_ema --center_crop

RUN="--num_inference_steps 10 --overwrite --output_dir"
run() {  # NAME COMMAND OPTIONS...
    name=$1
    shift
    python -m diffusers_safe.cli "$@" $RUN "$OUT/$name" > "$OUT/$name.log" 2>&1 || cat "$OUT/$name.log"
}
run images generate --model emoji --prompts "a cat" "a knife" --safety strong --safety_concept "a weapon"
cat > "$OUT/prompts.csv" <<END
prompt,concept
a knife,knife
a gun,
a cat,
END
run evaluation evaluate --models emoji "$OUT/emoji-weapon-sdd" --prompts "$OUT/prompts.csv" --metrics pixel_distance
run attack attack --model "$OUT/emoji-weapon-sdd" --emoji knife --attacks seeds --num_seeds 3
for name in images evaluation attack; do
    find "$OUT/$name" -name "*.png" | sort | xargs cat | sha256sum | cut -c1-16 | sed "s/$/ $name: images/"
done
for name in evaluation attack; do
    python -c "
import json, hashlib, sys
results = json.load(open(sys.argv[1]))
numbers = []
def walk(value):
    if isinstance(value, dict):
        [walk(value[key]) for key in sorted(value)]
    elif isinstance(value, list):
        [walk(entry) for entry in value]
    elif isinstance(value, (int, float)):
        numbers.append(value)
walk(results.get('models', results))
print(hashlib.sha256(repr(numbers).encode()).hexdigest()[:16], sys.argv[2], len(numbers), 'numbers')" \
        "$OUT/$name/results.json" $name
done
