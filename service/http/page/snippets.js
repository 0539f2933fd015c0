// The current request as commands to paste. A key is named as a variable of the environment, never written out.

/** A curl command. */
export function curlOf(url, body, needsKey) {
  const lines = [
    `curl -s ${quoted(url)}`,
    "-H 'Content-Type: application/json'",
    ...(needsKey ? ['-H "Authorization: Bearer $REWARD_API_KEY"'] : []),
    `-d ${quoted(JSON.stringify(body, null, 2))}`,
  ];
  return lines.join(" \\\n  ");
}

/** A Python program with the client of the service; it takes a key from REWARD_API_KEY. */
export function pythonOf(root, prompt, completions) {
  return [
    "from reward_client import RewardClient",
    "",
    `prompt = ${literal(prompt)}`,
    `completions = ${literal(completions)}`,
    `with RewardClient(${literal(root)}) as client:`,
    '    for item in client.score([prompt] * len(completions), completions, diagnostics="full"):',
    "        print(item.reward, item.details.ood)",
  ].join("\n");
}

/** Strings, lists and objects of them have the same literals in JSON and in Python. */
function literal(value) {
  return JSON.stringify(value, null, 2);
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
