# Completes config groups, their options and keys: `eval "$(tpresearch completion)"` in bash (zsh: after `autoload bashcompinit; bashcompinit`).
# After `python train.py`, `torchrun --nproc-per-node=4 train.py`, `python -m tpresearch.verify` and `tpresearch train` alike.
_tpresearch() {
    local line=${COMP_LINE:0:COMP_POINT} program=() words i
    read -ra words <<< "$line"
    for ((i = 0; i < ${#words[@]} && ${#program[@]} == 0; i++)); do
        case ${words[i]} in
            *train.py) program=(python "${words[i]}") ;;
            tpresearch.*) program=(python -m "${words[i]}") ;;
            tpresearch) ((++i < ${#words[@]})) && program=(tpresearch "${words[i]}") ;;
        esac
    done
    ((${#program[@]})) || return
    line="python train.py ${words[*]:i}$([[ $line == *" " ]] && echo " ")"
    local choices word=${line##* }
    choices=$(COMP_LINE=$line COMP_POINT=${#line} "${program[@]}" -sc query=bash 2> /dev/null)
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _tpresearch python torchrun tpresearch
