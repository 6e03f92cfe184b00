#!/bin/bash
# check-binary.sh FILE MAXSIZE: FILE is static, and not larger than MAXSIZE bytes.
set -euo pipefail
export LC_ALL=C
file=$1 max=$2

if command -v file >/dev/null; then
	what=$(file -bL "$file")
else # ldd ends with an error for a static binary
	what=$(ldd "$file" 2>&1 || true)
fi
case $what in
*'statically linked'* | *'not a dynamic executable'* | *'Not a valid dynamic program'*) ;;
*) echo "$file is not static: $what" >&2 && exit 1 ;;
esac

size=$(stat -Lc %s "$file")
if ((size > max)); then
	echo "$file has $size bytes, more than $max" >&2
	exit 1
fi
echo "$file: static, $size bytes"
