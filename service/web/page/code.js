// "Use in code": the task as it is, in three languages. Knows nothing of the page but the task's name and labels.

export const LANGUAGES = ["curl", "Python", "JavaScript"];

export function snippet(language, { classify, examples, labels, key }) {
  const known = `${labels.map((label) => JSON.stringify(label)).join(", ")} or `;
  return { curl, Python: python, JavaScript: javascript }[language]({ classify, examples, labels, known, key });
}

const quoted = (text) => `'${text.replace(/'/g, `'\\''`)}'`;

function curl({ classify, examples, labels, key }) {
  const auth = key ? ` -H "Authorization: Bearer $FEWSHOT_KEY"` : "";
  const label = labels.find((one) => !/[="\\;:]|^unlabelled$|^query$/.test(one)); // what curl takes as it is
  const teach = label === undefined ? "" : `

# Teach it one more example of ${label}
curl -s${auth} ${examples} -F ${quoted(`${label}=@another.jpg`)}`;
  return `# Ask about a photo
curl -s${auth} ${classify} -F image=@photo.jpg${teach}`;
}

function python({ classify, known, key }) {
  const [load, auth] = key ? ["import os\n", `, "Authorization": "Bearer " + os.environ["FEWSHOT_KEY"]`] : ["", ""];
  return `import json
${load}import urllib.request

request = urllib.request.Request(
    ${JSON.stringify(classify)},
    data=open("photo.jpg", "rb").read(),
    headers={"Content-Type": "image/jpeg"${auth}},
)
answer = json.load(urllib.request.urlopen(request))["predictions"][0]
print(answer["label"], answer["probability"])
# the label is ${known}None: none of these`;
}

function javascript({ classify, known, key }) {
  const auth = key ? ", Authorization: `Bearer ${process.env.FEWSHOT_KEY}`" : "";
  return `import { readFile } from "node:fs/promises";

const response = await fetch(${JSON.stringify(classify)}, {
  method: "POST",
  headers: { "Content-Type": "image/jpeg"${auth} },
  body: await readFile("photo.jpg"),
});
const answer = (await response.json()).predictions[0];
console.log(answer.label, answer.probability);
// the label is ${known}null: none of these`;
}
