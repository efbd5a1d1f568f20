#!/bin/bash
# bash tests/bench/campaign.sh SECONDS DATA OUT [NAME...]      trainings side by side, for so many seconds
#
# On a GPU name one: side by side each takes as long as all of them after each other.
# DATA holds brain_t1_2mm and hippocampus_mr (dataset.json in each). Each training goes on from the weights in the
# repository, but for universal, which begins from START, or anew, and leaves OUT/NAME/models/model.pt, the best by
# validation, and OUT/NAME.log. The learning rate falls with the time that has gone, so that no machine's speed need be
# known; EPOCHS (default 1000) of LENGTH (200) iterations end a training before its time. With FAST=1 the pairs are made on
# the GPU, by a thread beside the steps, and SACB-Net's steps are CUDA graphs. DRY=1 prints the commands.
set -u
seconds=$1 data=$2 out=$3; shift 3
begin=$(date +%s)
fast=() on_gpu=() graphs=()
if [ "${FAST:-0}" = 1 ]; then
    fast=(--train::dataloader::_target_ ThreadDataLoader) on_gpu=(--scans_device cuda:0) graphs=(--cuda_graphs True)
fi
mkdir -p "$out"
cat >"$out/average.json" <<'JSON'
{
    "average": {"_target_": "common.train.engines.average_of", "network": "@network"},
    "+train::handlers": [
        {"_target_": "common.train.engines.AverageWeights", "network": "@network", "average": "@average", "momentum": 0.002}
    ],
    "train::handlers::5::objects::average": "@average",
    "validate::evaluator::network": "@average",
    "validate::handlers::4::network": "@average"
}
JSON
echo "{\"lr_scheduler::lr_lambda\": \"\$lambda epoch: max(1 - (__import__('time').time() - $begin) / $seconds, 0.02) ** 0.9\"}" >"$out/rate.json"

train() { # NAME BUNDLE OPTIONS...
    local name=$1 bundle=$2; shift 2
    local line=(python3 -m monai.bundle run --config_file "['bundles/$bundle/configs/train.json'${OVERLAY:-},'$out/rate.json']" --bundle_root "bundles/$bundle"
        --dataset_dir "$data/brain_t1_2mm" --output_dir "$out/$name" --epoch_length "${LENGTH:-200}"
        --max_epochs "${EPOCHS:-1000}" --val_interval "${EVERY:-4}" --val_pairs "${PAIRS:-4}" "${fast[@]}" "$@")
    OVERLAY=
    if [ "${DRY:-0}" = 1 ]; then printf '%q ' "${line[@]}"; echo; return; fi
    timeout -s INT -k 10 "$seconds" "${line[@]}" >>"$out/$name.log" 2>&1 &
}

for name in ${*:-universal sacb_net residual_aligner dual_flownet}; do
    case $name in
    universal) OVERLAY=",'bundles/sacb_net/configs/shapes.json'" train universal sacb_net --hippocampus_dir "$data/hippocampus_mr" \
        --size "[80,96,80]" --batch_size 1 --learning_rate 0.001 --weights "${START:-null}" "${graphs[@]}" \
        --train::handlers::6::momentum 0.002 --loss::until 0 ;;
    sacb_net) OVERLAY=",'$out/average.json'" train sacb_net sacb_net "${on_gpu[@]}" "${graphs[@]}" --weights bundles/sacb_net/models/model.pt --learning_rate 0.0006 --window 7 --smoothness 0.6 \
        --folding 10 --same_prob 0.1 --deformation 1.5 --contrast_prob 0.5 --flip_prob 0.5 ;;
    residual_aligner) train residual_aligner residual_aligner "${on_gpu[@]}" --weights bundles/residual_aligner/models/model.pt --learning_rate 0.0005 \
        --window 7 --smoothness 2.0 --consistency 0.05 --flip_prob 0.5 ;;
    dual_flownet) train dual_flownet dual_flownet "${on_gpu[@]}" --weights bundles/dual_flownet/models/model.pt --learning_rate 0.0004 --lr_decay 0.9 \
        --window 7 --alpha 8.0 --beta 1.2 --gamma 0.5 --dice_weight 1.0 --label_weight 3.0 --fine_labels True \
        --mirror_prob "[0.5,0,0]" --rotation 0 --deformation 1.0 --contrast_prob 0.5 ;;
    *) echo "unknown training $name" >&2; exit 1 ;;
    esac
done
wait
for log in "$out"/*.log; do echo "$log: $(grep -a '^epoch' "$log" | tail -n 1)"; done
