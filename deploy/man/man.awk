# A man page from a template, in which lines of this form stand for what the programs say themselves:
#
#     @options einsumd          the options of `einsumd --help`
#     @config einsumd           the keys of `einsumd --help-config`
#     @commands einsumctl       every command of `einsumctl --help`, with its own help
#     @options einsumctl
#
#     awk -v programs=PATH,PATH -v version=V -v date=D -f man.awk TEMPLATE
#
# @VERSION@ and @DATE@ are replaced. What cannot be understood is an error, not an empty page.

function fail(text) {
    print "man.awk: " text >"/dev/stderr"
    failed = 1
    exit 1
}

# Text as roff takes it.
function plain(text) {
    gsub(/\\/, "\\e", text)
    gsub(/-/, "\\-", text)
    if (text ~ /^[.']/)
        text = "\\\\&" text
    return text
}

function tagged(tag, text) {
    printf ".TP\n.B %s\n%s\n", plain(tag), plain(text)
}

# "  -c, --config FILE   meaning", to what stands left and right of the first gap.
function option(line) {
    sub(/^ +/, "", line)
    if (!match(line, /  +/))
        fail("an option without a gap before its meaning: " line)
    tagged(substr(line, 1, RSTART - 1), substr(line, RSTART + RLENGTH))
}

function run(program, arguments) {
    if (!(program in found))
        fail("no program " program " among those given")
    return found[program] " " arguments
}

function options(program,    command, line, n) {
    command = run(program, "--help")
    while ((command | getline line) > 0)
        if (line ~ /^ +(-[a-z], )?--/) {
            option(line)
            n++
        }
    close(command)
    if (!n)
        fail(program " --help lists no option")
}

# "  KEY DEFAULT VALUE", its meaning on the next line; sections at the left edge.
function config(program,    command, line, key, preset, n, on) {
    command = run(program, "--help-config")
    while ((command | getline line) > 0) {
        if (line ~ /^ +meaning$/) {
            on = 1
        } else if (!on || line == "") {
            continue
        } else if (line ~ /^[^ ]/) {
            printf ".SS %s\n", plain(toupper(substr(line, 1, 1)) substr(line, 2))
        } else if (line ~ /^      /) {
            sub(/^ +/, "", line)
            printf ".br\n%s\n", plain(line)
        } else {
            sub(/^ +/, "", line)
            match(line, / +/)
            key = substr(line, 1, RSTART - 1)
            line = substr(line, RSTART + RLENGTH)
            if (!match(line, / +(an? |one of |true or )/))
                fail("no value in: " key " " line)
            preset = substr(line, 1, RSTART - 1)
            line = substr(line, RSTART)
            sub(/^ +/, "", line)
            tagged(key, line "; " (preset == "(required)" ? "required" : "default " preset))
            n++
        }
    }
    close(command)
    if (!n)
        fail(program " --help-config lists no key")
}

# A command's help: usage, text, examples (indented), options.
function subcommand(program, name, summary,    command, line, verbatim, on) {
    printf ".SS %s\n", plain(name)
    command = run(program, name " --help")
    while ((command | getline line) > 0) {
        if (line ~ /^usage: /) {
            printf ".B %s\n.PP\n", plain(substr(line, 8))
            continue
        }
        if (line ~ /^options:/) {
            on = 1
            continue
        }
        if (line ~ /^--endpoint, /)
            continue
        if (verbatim && line !~ /^  /) {
            print ".EE"
            verbatim = 0
        }
        if (on && line ~ /^  /) {
            option(line)
        } else if (line ~ /^  /) {
            if (!verbatim)
                print ".PP\n.EX"
            verbatim = 1
            print plain(line)
        } else if (line != "") {
            print plain(line)
        }
    }
    if (verbatim)
        print ".EE"
    if (close(command) != 0)
        fail(program " " name " --help failed")
}

function commands(program,    command, line, on, n, i, names) {
    command = run(program, "--help")
    while ((command | getline line) > 0) {
        if (line ~ /^commands:/) {
            on = 1
        } else if (on && line == "") {
            on = 0
        } else if (on) {
            sub(/^ +/, "", line)
            sub(/ .*/, "", line)
            names[++n] = line
        }
    }
    close(command)
    if (!n)
        fail(program " --help lists no command")
    for (i = 1; i <= n; i++)
        subcommand(program, names[i])
}

BEGIN {
    given_n = split(programs, given, ",")
    for (i = 1; i <= given_n; i++) {
        name = given[i]
        sub(/.*\//, "", name)
        found[name] = given[i]
    }
}
/^@options / { options($2); next }
/^@config / { config($2); next }
/^@commands / { commands($2); next }
{
    gsub(/@VERSION@/, version)
    gsub(/@DATE@/, date)
    print
}
END { exit failed }
