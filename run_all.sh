#!/usr/bin/env bash
# The five studies, one line per experiment.
#
#   bash run_all.sh                     every experiment, on data/<study>
#   bash run_all.sh 3 11                experiments 3 and 11 of the eye-pair study
#   bash run_all.sh aptos mrnet         whole studies: odir aptos dr retina mrnet; or one run by name: dr-resnet50
#   bash run_all.sh --demo              all of it, small, on rendered stand-ins
#   bash run_all.sh --seeds 3 3 11      each with three seeds: mean and standard deviation in the table
#   bash run_all.sh --control 3         with the labels shuffled among the training rows: what chance gives
#
# Names come first. From the first flag after them everything goes to train.py:
#   bash run_all.sh 3 11 --data /scans/odir --missing drop --trunk efficientnet-lite0
# Finished runs are not repeated, interrupted ones go on, stale tests are made again. Ends with the table published
# beside measured: runs/results.csv, runs/report.html.
cd "$(dirname "$0")" || exit 2

script=${0##*/} prefix="" demo="" seeds=1 chosen=() extra=() control=()
die() { echo "run_all.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case "$1" in
        -h|--help) sed -n '2,/^cd /{/^cd /d;s/^# \{0,1\}//p;}' "$script"; exit 0 ;;
        --demo) demo=yes prefix+=demo- ;;
        --control) control=(--shuffle-labels) ;;
        --seeds) seeds=${2:-none}; shift ;;
        --*) extra=("$@"); break ;;
        [0-9]|[0-9][0-9]) chosen+=("$(printf 'odir-%02d' "$((10#$1))")") ;;
        *) chosen+=("$1") ;;
    esac
    shift
done
for name in "${chosen[@]}"; do
    [[ "$name" != *[!a-z0-9-]* ]] && grep -qE "^run $name(-| )" "$script" || die "unknown experiment '$name': a number 0-17, a study or a run's name"
done
for flag in "${extra[@]}"; do
    case "$flag" in --runs*|--name*|--resume*|--dataset*) die "$flag is set by each line of this script" ;; esac
    case "$flag" in --shuffle-labels*) die "$flag: bash run_all.sh --control ... trains with shuffled labels, and says so" ;; esac
    case "$flag" in --demo|--control|--seeds) die "$flag comes before the first flag of train.py" ;; esac
done
[[ "$seeds" =~ ^[1-9][0-9]*$ ]] || die "--seeds $seeds is no number"
[[ "$seeds" = 1 || " ${extra[*]} " != *" --seed"[\ =]* ]] || die "--seeds and --seed: the same seed twice is no second run"
[ ${#control[@]} -eq 0 ] || prefix="control-$prefix"
. ./setup.sh
failed=() absent=() pids=() titles=() logs=() folders=() slots=1
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # a test runs beside the next training: threads that spin would slow both
if [ -n "$demo" ]; then # its small lines run beside each other, each on one core
    slots=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    [ "$slots" -le 4 ] || slots=4
    export OMP_NUM_THREADS=1
fi
export END_WITH_PARENT=$$ # a script that loses this one ends, and says how to go on
stop() { kill $(jobs -p) 2>/dev/null; wait; echo "stopped: the same command goes on" >&2; exit "$1"; }
trap 'stop 143' TERM HUP
trap 'stop 130' INT

is_chosen() { # is run $1 among the experiments asked for?
    local name
    for name in "${chosen[@]}"; do [[ "$1" == "$name" || "${1%%-*}" == "$name" ]] && return 0; done
    [ ${#chosen[@]} -eq 0 ]
}

part_of() { # the part that run $1 is tested on: APTOS was published on its test part, the others on validation
    case "$1" in *aptos-*) echo test ;; *) echo val ;; esac
}

is_tested() { # is the test in folder $1 one of its best checkpoint, by content?
    local digest; digest=$(sed -n 's/^ *"best_digest": \("[0-9a-f]*"\).*/\1/p' "$1/run.json")
    local asked
    for asked in "\"digest\": ${digest:-none}" '"own": true' "\"split\": \"$(part_of "$1")\"" '"tta": false' '"threshold": 0.5,'; do
        grep -qsF "$asked" "$1/test_scores.json" || return 1
    done
    [ "$(grep -c '"path":' "$1/test_scores.json")" = 1 ]
}

demo_flags() { # what makes line $1 small; later flags win over its own. Lite0's real weights, where the line does not say none
    echo "--data data/demo/${1%%-*}"
    case "$1" in
        odir-10)     echo --trunk efficientnet-lite0 --size 128 --epochs 8 ;;
        odir-1[3-7]) echo --trunk efficientnet-lite0 --size 64 --epochs 5 --batch 8 --lr 0.01 --precision fp32
                     [[ "$*" != *" --crop "* ]] || echo --crop 56 ;;
        odir-best)   echo --size 64 --crop 56 --epochs 4 --batch 8 --ema 0.9 --precision fp32 ;;
        odir-best-frozen) echo --size 96 --epochs 8 ;;
        odir-*)      echo --trunk efficientnet-lite0 --size 96 --epochs 8 ;;
        aptos-*)     echo --model efficientnet-lite0 --size 64 --epochs 5 --batch 8 --lr 0.0005 --gamma 0.9 ;;
        dr-*-scratch) echo --size 64 --crop 56 --epochs 2 --freeze-epochs 0 --batch 8 ;;
        dr-*)        echo --model efficientnet-lite0 --size 64 --crop 56 --epochs 4 --freeze-epochs 1 --batch 8 --lr 0.003 ;;
        retina-*)    echo --size 96 --epochs 6 ;;
        mrnet-*)     echo --weights none --preprocess none --size 64 --epochs 2 --lr 0.0001 ;;
    esac
}
declare -A demo_patients=([odir]=160 [aptos]=120 [dr]=80 [retina]=100 [mrnet]=36)

python_() { # in the background, because bash hears of a signal only while it waits
    "$PYTHON" "$@" & wait $!
}

begin() { # begin TITLE LOG FOLDER COMMAND...: a job beside what follows; FOLDER: the run that is then to be tested, or ""
    while [ ${#pids[@]} -ge "$slots" ]; do finish_one; done
    "${@:4}" > "$2" 2>&1 &
    pids+=($!) titles[${!}]=$1 logs[${!}]=$2 folders[${!}]=$3
}

begin_test() { # of the run in folder $1
    begin "test of $1" "$1/test.log" "" "$PYTHON" test.py --ckpt "$1" --split "$(part_of "$1")"
}

finish_one() { # wait until one of the jobs has ended
    local k pid
    while true; do
        for k in "${!pids[@]}"; do kill -0 "${pids[k]}" 2>/dev/null || break 2; done
        sleep 0.1 & wait $!
    done
    pid=${pids[k]}; unset "pids[k]"
    if ! wait "$pid"; then
        failed+=("${titles[pid]}"); tail -n 3 "${logs[pid]}" >&2
    elif [ -n "${folders[pid]}" ]; then
        grep "^runs/.* scores: " "${logs[pid]}"
        begin_test "${folders[pid]}"
    fi
}

finish_all() {
    while [ ${#pids[@]} -gt 0 ]; do finish_one; done
}

run() { # run NAME FLAGS...: train what is not finished, then test it
    local name=$1 study=${1%%-*} small=() number file; shift
    is_chosen "$name" || return 0
    if [ -n "$demo" ]; then
        read -ra small -d '' < <(demo_flags "$name" "$@")
        [ -f "data/demo/$study/rendered.json" ] || python_ render_data.py "data/demo/$study" --dataset "$study" \
            --patients "${demo_patients[$study]}" --size 96 || exit 2
    elif [[ ! -d "data/$study" && " ${extra[*]} " != *" --data"* ]]; then
        absent+=("data/$study"); return 0
    fi
    for ((number = 42; number < 42 + seeds; number++)); do
        local full="$prefix$name" seed=() flags=() status=0
        [ "$number" -eq 42 ] || { full+="-seed$number"; seed=(--seed "$number"); }
        local folder="runs/$full"
        if grep -qs '"status": "finished"' "$folder/run.json"; then
            [ ${#extra[@]} -eq 0 ] || echo "== $full: ${extra[*]} changes nothing, it keeps the flags and the data of $folder/run.json"
            for file in "$@"; do # what it was trained from: an earlier run's weights and spread labels
                [ ! -f "$file" ] || [ ! "$file" -nt "$folder/run.json" ] || echo "== $full: $file is newer than this run: delete $folder to run it again"
            done
            is_tested "$folder" && { echo "== $full: finished before (delete $folder to run it again)"; continue; }
            echo "== $full: finished before, tested again"
            begin_test "$folder"
            continue
        elif [ -f "$folder/last.pt" ]; then
            echo "== $full: goes on"
            flags=(--resume "$folder" "${extra[@]}")
        else
            echo "== $full"
            flags=(--name "$full" --dataset "$study" "$@" "${small[@]}" "${control[@]}" "${extra[@]}" "${seed[@]}")
        fi
        if [ -n "$demo" ]; then
            mkdir -p runs
            begin "$full" "$folder.log" "$folder" "$PYTHON" train.py "${flags[@]}"
            continue
        fi
        python_ train.py "${flags[@]}" || status=$?
        case "$status" in
            0) begin_test "$folder" ;; # beside the next training
            130|143) exit "$status" ;; # Ctrl-C: the next call goes on here
            *) failed+=("$full"); echo "== $full: FAILED with status $status" >&2 ;;
        esac
    done
}

spread() { # label the unlabelled pictures with the model of run $1, for the runs $2 and $3
    is_chosen "$2" || is_chosen "$3" || return 0
    local folder="runs/$prefix$1" status=0
    [ -z "$demo" ] || finish_all # its model is one of them
    if [ ! -f "$folder/best.pt" ] || [ "$folder/pseudo_labels.csv" -nt "$folder/best.pt" ]; then return 0; fi
    python_ spread_labels.py --ckpt "$folder" || status=$?
    case "$status" in 0) ;; 130|143) exit "$status" ;; *) failed+=("spread of $1") ;; esac
}

# ---- ODIR-5K, two photographs a patient: the write-up's experiments 0-12
run odir-00 --model v0 --preprocess none --size 224 --lr 0.001 --scheduler none   --batch 32 --epochs 50  --patience 5
run odir-01 --model v0 --preprocess fov  --size 224 --lr 0.001 --scheduler none   --batch 32 --epochs 50  --patience 5
run odir-02 --model v0 --preprocess fov  --size 224 --lr 0.01  --scheduler linear --batch 32 --epochs 100 --patience 20
run odir-03 --model v0 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20
run odir-04 --model v0 --preprocess fov  --size 224 --lr 0.001 --scheduler cyclic --batch 32 --epochs 100 --patience 20
run odir-05 --model v1 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20
run odir-06 --model v2 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20
run odir-07 --model v2 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 100
run odir-08 --model v0 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20  --augment eyes
run odir-09 --model v2 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 100 --augment eyes
run odir-10 --model v0 --preprocess fov  --size 512 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20
run odir-11 --model v0 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20  --weighted-loss
run odir-12 --model v0 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20  --sampler balanced
# follow-ups 13-17: the trunk is trained too
run odir-13 --model v0 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20  --weighted-loss --fine-tune
run odir-14 --model v0 --preprocess fov  --size 224 --lr 0.05  --scheduler linear --batch 32 --epochs 100 --patience 20  --weighted-loss --fine-tune --augment pair --crop 196
run odir-15 --model v0 --preprocess fov  --size 512 --lr 0.01  --scheduler linear --batch 16 --epochs 100 --patience 30  --weighted-loss --fine-tune --augment pair --crop 448
run odir-16 --model v0 --preprocess fov  --size 512 --lr 0.1   --scheduler linear --batch 16 --epochs 100 --patience 30  --weighted-loss --fine-tune --augment pair --crop 448
run odir-17 --model v0 --preprocess fov  --size 512 --lr 0.001 --scheduler linear --batch 16 --epochs 100 --patience 30  --weighted-loss --fine-tune --augment pair --crop 448
# beyond the publication: settings chosen by cross-validation on the training patients (docs/results.md)
run odir-best-frozen --model v3 --trunk efficientnet-lite0-blocks --preprocess fov --size 224 --optimizer adamw --lr 0.003 --weight-decay 1 --scheduler cosine --batch 32 --epochs 40 --keep last --loss asymmetric --folds 5
run odir-best        --model v3 --trunk efficientnet-lite0-blocks --preprocess fov --size 224 --optimizer adamw --lr 0.003 --trunk-lr 0.333 --weight-decay 0.05 --scheduler cosine --batch 16 --epochs 28 --keep last --weighted-loss --weight-power 0.5 --ema 0.998 --fine-tune --augment pair --crop 196

# ---- APTOS 2019: diabetic retinopathy grade from one photograph
run aptos-1 --model efficientnet-b1 --preprocess none --size 224 --optimizer adam --lr 0.01 --scheduler step --schedule-epochs 1 --gamma 0.7 --batch 30 --epochs 50 --patience 50 --sampler weighted --fine-tune

# ---- DR grading lab (EyePACS): 5 epochs the head, 20 everything
lab="--preprocess centre --size 256 --crop 224 --augment lab --lr 0.001 --weight-decay 0.0005 --scheduler none --fine-tune --freeze-epochs 5 --epochs 25 --patience 25 --drop-last"
run dr-resnet18          --model resnet18 --batch 64 --weights imagenet $lab
run dr-resnet18-scratch  --model resnet18 --batch 64 --weights none     $lab
run dr-resnet50          --model resnet50 --batch 16 --weights imagenet $lab
run dr-resnet50-scratch  --model resnet50 --batch 16 --weights none     $lab
run dr-resnet50-weighted --model resnet50 --batch 16 --weights imagenet --weighted-loss $lab

# ---- Retina, AlexNet on the green channel: supervised, then with spread labels, then one against normal
seed="--model alexnet --weights none --optimizer adam --lr 0.001 --scheduler none --epochs 50 --fine-tune"
first="runs/${prefix}retina-1"
run retina-1 $seed
spread retina-1 retina-2 retina-3
run retina-2 $seed --pseudo-labels "$first/pseudo_labels.csv" --weights "$first/best.pt"
run retina-3 $seed --pseudo-labels "$first/pseudo_labels.csv"
run retina-4 $seed --labels glaucoma normal
run retina-5 $seed --labels "diabetic retinopathy" normal

# ---- MRNet: knee MRI in three planes; the three labels at once, then each alone
knee="--model mrnet --optimizer adam --lr 0.00001 --weight-decay 0.01 --scheduler plateau --batch 1 --epochs 50 --patience 50 --weighted-loss --augment knee --size 224 --fine-tune"
run mrnet-1        $knee
run mrnet-abnormal $knee --labels abnormal
run mrnet-acl      $knee --labels acl
run mrnet-meniscus $knee --labels meniscus

finish_all
if [ ${#absent[@]} -gt 0 ]; then
    folders=$(printf '%s\n' "${absent[@]}" | sort -u | paste -sd ' ')
    echo "${#absent[@]} experiments were not run, as there is no $folders: docs/data.md says where these come from, and bash run_all.sh --demo runs all on rendered stand-ins."
fi
if compgen -G 'runs/*/run.json' > /dev/null; then "$PYTHON" report.py || exit 2; fi
if [ ${#failed[@]} -gt 0 ]; then echo "FAILED: ${failed[*]}" >&2; exit 1; fi
