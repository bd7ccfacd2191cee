// What the page says, in English and Chinese, by the first of the browser's languages that is one of them.

const ENGLISH = {
  title: "Search pictures and sounds",
  tab: (name) => `Search: ${name}`,
  about: (name, pictures, sounds) => `${name}: ${amount(pictures, "picture")}, ${amount(sounds, "sound")}`,
  skip: "Skip to the results",
  box: "Words, or a picture or sound",
  placeholder: "Describe what you look for, or drop a picture or sound",
  placeholderShort: "Search for…",
  go: "Search",
  choose: "Search by a picture or sound file",
  record: "Record a sound",
  stop: "Stop recording and search",
  recording: (seconds) => `Recording, ${seconds} seconds at most. Press again to search.`,
  recorded: "your recording",
  clear: "Clear the query",
  pictures: "Pictures",
  sounds: "Sounds",
  more: "Show more",
  noPictures: "There are no pictures in this index.",
  noSounds: "There are no sounds in this index.",
  noOther: "There is nothing else.",
  searching: "Searching…",
  found: (names) => (names.length ? `Found. Best: ${names.join(", ")}.` : "Nothing found."),
  byFile: (name) => `Most like ${name}`,
  bySound: "Search by its sound",
  byPicture: "Search by its picture",
  similar: "More like this",
  similarTo: (name) => `More like ${name}`,
  open: (name, score) => `Open ${name}${score}`,
  play: (name, score) => `Play ${name}${score}`,
  position: (name) => `Position in ${name}`,
  score: (value) => `, similarity ${value}`,
  scoreHint: "Cosine similarity. Compare it within one kind only.",
  save: "Save the file",
  close: "Close",
  drop: "Drop a picture or a sound",
  keys: "Keyboard",
  local: "The computer that serves this page answers by itself; nothing is sent anywhere else.",
  cannotPlay: "This browser does not play this kind of file.",
  cannotShow: "This file cannot be shown.",
  saveIt: "Save it",
  noMicrophone: "No microphone was found.",
  noPermission: "The browser has no permission to use the microphone; allow it in the address bar.",
  insecure: "Recording needs https, or the page opened on this computer as http://localhost.",
  noRecorder: "This browser cannot record; drop a sound file instead.",
  emptyRecording: "The recording is empty; hold on for a second.",
  wrongType: (name) => `${name} is neither a picture nor a sound.`,
  tooLarge: (limit) => `The file is too large; ${limit} MB at most.`,
  tooLong: (limit) => `The sound is too long; ${limit} seconds at most.`,
  unreadable: (reason) => `Not readable: ${reason}`,
  noModality: "This model cannot search by this kind.",
  busy: "The server has too much to do; try again in a moment.",
  gone: "The server does not answer; is it still running?",
  failed: (reason) => `That did not work: ${reason}`,
  keyList: [["/", "to the search box"], ["↓", "from the box into the results"], ["← ↑ → ↓", "between results"],
    ["Enter", "open a picture, play or pause a sound"], ["m", "more like this"], ["u", "choose a file"],
    ["r", "record; again: stop and search"], ["Ctrl V", "paste a picture"], ["Esc", "stop recording, close, clear"],
    ["?", "this list"]],
};

const CHINESE = {
  title: "搜索图片和声音",
  tab: (name) => `搜索：${name}`,
  about: (name, pictures, sounds) => `${name}：${number(pictures)} 张图片，${number(sounds)} 段声音`,
  skip: "跳到结果",
  box: "文字，或者图片、声音",
  placeholder: "描述想找的内容，或拖入图片、声音",
  placeholderShort: "想找什么？",
  go: "搜索",
  choose: "用图片或声音文件搜索",
  record: "录音",
  stop: "停止录音并搜索",
  recording: (seconds) => `正在录音，最长 ${seconds} 秒。再按一次即开始搜索。`,
  recorded: "刚才的录音",
  clear: "清除查询",
  pictures: "图片",
  sounds: "声音",
  more: "显示更多",
  noPictures: "索引里没有图片。",
  noSounds: "索引里没有声音。",
  noOther: "没有别的了。",
  searching: "正在搜索……",
  found: (names) => (names.length ? `已找到，最相似的是 ${names.join("、")}。` : "没有找到。"),
  byFile: (name) => `与 ${name} 最相似`,
  bySound: "改用它的声音搜索",
  byPicture: "改用它的画面搜索",
  similar: "找相似的",
  similarTo: (name) => `找与 ${name} 相似的`,
  open: (name, score) => `打开 ${name}${score}`,
  play: (name, score) => `播放 ${name}${score}`,
  position: (name) => `${name} 的播放位置`,
  score: (value) => `，相似度 ${value}`,
  scoreHint: "余弦相似度，只能在同一类结果之间比较。",
  save: "保存文件",
  close: "关闭",
  drop: "松开，用图片或声音搜索",
  keys: "键盘操作",
  local: "查询全部由提供本页的电脑完成，不会发送到别处。",
  cannotPlay: "浏览器无法播放这种文件。",
  cannotShow: "这个文件无法显示。",
  saveIt: "保存到本机",
  noMicrophone: "没有找到麦克风。",
  noPermission: "浏览器没有使用麦克风的权限，请在地址栏里允许。",
  insecure: "录音需要 https，或在本机用 http://localhost 打开本页。",
  noRecorder: "这个浏览器不能录音，请拖入声音文件。",
  emptyRecording: "录音是空的，请多录一会儿。",
  wrongType: (name) => `${name} 既不是图片也不是声音。`,
  tooLarge: (limit) => `文件太大，最多 ${limit} MB。`,
  tooLong: (limit) => `声音太长，最长 ${limit} 秒。`,
  unreadable: (reason) => `无法读取：${reason}`,
  noModality: "这个模型不能用这类内容搜索。",
  busy: "服务器正忙，请稍后再试。",
  gone: "服务器没有响应，它还在运行吗？",
  failed: (reason) => `没有成功：${reason}`,
  keyList: [["/", "到搜索框"], ["↓", "从搜索框到结果"], ["← ↑ → ↓", "在结果之间移动"],
    ["Enter", "打开图片；播放或暂停声音"], ["m", "找相似的"], ["u", "选择文件"], ["r", "录音；再按一次停止并搜索"],
    ["Ctrl V", "粘贴图片"], ["Esc", "停止录音、关闭、清除"], ["?", "显示本列表"]],
};

const tag = (navigator.languages || [navigator.language || "en"]).find((one) => /^(zh|en)\b/i.test(one)) || "en";
export const language = /^zh/i.test(tag) ? "zh-CN" : "en";
const words = language === "en" ? ENGLISH : CHINESE;

export function number(value) {
  return value.toLocaleString(language);
}

function amount(count, noun) {
  return `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** What the page says under a name, with its values. */
export function say(name, ...values) {
  const found = words[name];
  return typeof found === "function" ? found(...values) : found;
}

/** Give every element below `root` its text and its label. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of root.querySelectorAll("[data-label]")) label(element, say(element.dataset.label));
}

/** The name of an element for screen readers, and the hint that a mouse sees. */
export function label(element, text) {
  element.setAttribute("aria-label", text);
  element.title = text;
}
