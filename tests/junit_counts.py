"""Prints what a JUnit file of ctest or pytest says: "passed failed skipped" on the first line, then
one line for each test that failed or was skipped, with its reason."""

import sys
import xml.etree.ElementTree as ElementTree

root = ElementTree.parse(sys.argv[1]).getroot()
passed = failed = skipped = 0
remarks = []
for case in root.iter("testcase"):
    name = case.get("name", "?")
    if case.get("classname") not in (None, name):
        name = f"{case.get('classname')}.{name}"
    bad = [*case.findall("failure"), *case.findall("error")]
    skips = case.findall("skipped")
    if bad or case.get("status") == "fail":
        failed += 1
        remarks.append(f"FAILED {name}: {bad[0].get('message', '') if bad else ''}")
    elif skips or case.get("status") in ("notrun", "disabled"):
        skipped += 1
        reason = skips[0].get("message") if skips else None
        remarks.append(f"SKIPPED {name}: {reason or 'no reason given'}")
    else:
        passed += 1
print(passed, failed, skipped)
for remark in remarks:
    print(" ".join(remark.split())[:300])
