# Completion of attackroute's commands and options in bash; in zsh, after `autoload -U bashcompinit && bashcompinit`.
# The words come from the commands' own help, so that they are never out of date.
_attackroute() {
    local current="${COMP_WORDS[COMP_CWORD]}" words
    if ((COMP_CWORD == 1)); then
        words=$(attackroute --help | sed -n '/^Commands:/,/^Options:/s/^  \([a-z][a-z]*\) .*/\1/p')
    elif [[ $current == -* ]]; then
        words=$(COLUMNS=200 attackroute "${COMP_WORDS[1]}" --help 2>/dev/null |
            sed -n 's/^  \(-[a-z], \)\{0,1\}\(--[a-z][a-z-]*\).*/\2/p' | sort -u)
    fi
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
}
complete -o default -F _attackroute attackroute
