"""What reports say, in English and Chinese, and how they write numbers: for the Markdown file, the page and the
comparison of runs."""

import math
import os
from collections.abc import Mapping
from typing import Any

PHRASES: dict[str, dict[str, str]] = {key: {"en": en, "zh": zh} for key, en, zh in (
    ("title_training", "Training report", "训练报告"),
    ("title_evaluation", "Evaluation report", "评测报告"),
    # ---- the verdict
    ("comma", ", ", "，"), ("listed", ", ", "、"),
    ("verdict", "On the {split} split the model {parts}: {judgement}; {earlier}.",
     "在 {split} 划分上，模型{parts}：{judgement}；{earlier}。"),
    ("verdict_nothing", "Nothing was evaluated, so there is no verdict.", "没有可评测的内容，因此没有结论。"),
    ("verdict_text_to_image_R@1", "finds the right image for a caption at once in {value} of cases (chance {chance})",
     "按描述找图，首个结果就正确的占 {value}（随机为 {chance}）"),
    ("verdict_text_to_audio_R@1", "finds the right sound for a caption in {value} (chance {chance})",
     "按描述找声音，首个结果就正确的占 {value}（随机为 {chance}）"),
    ("verdict_image_to_audio_R@1", "finds the right sound for an image in {value} (chance {chance})",
     "按图找声音，首个结果就正确的占 {value}（随机为 {chance}）"),
    ("verdict_EER", "tells speakers apart with an equal error rate of {value} (chance {chance})",
     "区分说话人的等错误率为 {value}（随机为 {chance}）"),
    ("verdict_image_to_class_top1", "names the class of an image rightly in {value} (chance {chance})",
     "给图像分类，正确的占 {value}（随机为 {chance}）"),
    ("verdict_audio_to_class_top1", "names the class of a sound rightly in {value} (chance {chance})",
     "给声音分类，正确的占 {value}（随机为 {chance}）"),
    ("verdict_image_to_concepts_mAP",
     "ranks the concepts of images with a mean average precision of {value} (chance {chance})",
     "判断图像中的概念，平均精度均值为 {value}（随机为 {chance}）"),
    ("verdict_audio_to_concepts_mAP",
     "ranks the concepts of sounds with a mean average precision of {value} (chance {chance})",
     "判断声音中的概念，平均精度均值为 {value}（随机为 {chance}）"),
    ("short_text_to_image_R@1", "images by text", "按描述找图"),
    ("short_text_to_audio_R@1", "sounds by text", "按描述找声音"),
    ("short_image_to_audio_R@1", "sounds by image", "按图找声音"), ("short_EER", "speakers", "说话人"),
    ("short_image_to_class_top1", "classes of images", "图像分类"),
    ("short_audio_to_class_top1", "classes of sounds", "声音分类"),
    ("short_image_to_concepts_mAP", "concepts of images", "图像的概念"),
    ("short_audio_to_concepts_mAP", "concepts of sounds", "声音的概念"),
    ("verdict_one", "better than chance", "好于随机"), ("verdict_all", "all better than chance", "全部好于随机"),
    ("verdict_some", "better than chance for {shown}, not shown to be for {missed}",
     "“{shown}”好于随机，“{missed}”看不出好于随机"),
    ("verdict_none", "not shown to be better than chance", "看不出好于随机"),
    ("earlier_none", "this folder has no earlier run of the same recipe to compare with",
     "这个文件夹里没有同一配方的更早结果可供比较"),
    ("earlier_other", "the same recipe's run of {when} was evaluated on other samples, so the two are not compared",
     "同一配方 {when} 的那次用的是另一些样本，因此不作比较"),
    ("earlier_without", "the same recipe's run of {when} has no intervals in common with it to compare",
     "与同一配方 {when} 的那次没有共同的置信区间可供比较"),
    ("earlier_same", "none of its {compared} figures differs beyond the intervals from the same recipe's run of {when}",
     "与同一配方 {when} 的那次相比，{compared} 项指标都没有超出置信区间的差别"),
    ("earlier_differs", "against the same recipe's run of {when}, {better} of {compared} figures are better and "
     "{worse} worse beyond the intervals",
     "与同一配方 {when} 的那次相比，{compared} 项指标中有 {better} 项更好、{worse} 项更差（超出置信区间）"),
    # ---- the page
    ("per_caption", "Counted caption by caption, as in papers", "逐条描述计算（论文的算法）"),
    ("earlier_title", "Differences from {file} beyond the intervals", "与 {file} 相比超出置信区间的差别"),
    ("before", "Before", "之前"), ("now", "Now", "现在"), ("better", "better", "更好"), ("worse", "worse", "更差"),
    ("curve_loss", "Training loss over steps,", "训练损失（横轴：步数），"),
    ("curve_validation", "Validation loss over epochs", "验证损失（横轴：轮数）"),
    ("curve_retrieval", "Validation retrieval over epochs,", "验证集检索（横轴：轮数），"),
    ("curve_lr", "Learning rate over steps", "学习率（横轴：步数）"),
    ("curve_samples_per_s", "Samples per second over steps", "每秒样本数（横轴：步数）"),
    ("curve_data_wait_pct", "Time spent waiting for data, %, over steps", "等待数据的时间占比 %（横轴：步数）"),
    ("memory", "Memory", "内存"), ("memory_planned", "planned", "计划"), ("memory_measured", "measured", "实测"),
    ("time", "Time", "用时"), ("time_training", "training", "训练"), ("time_validation", "validation", "验证"),
    ("time_saving", "saving", "保存"), ("time_waiting", "waiting for data", "等待数据"),
    ("time_evaluation", "evaluation at the end", "最后的评测"),
    ("left_out", "Left out", "未使用"),
    ("left_gone", "{n} of {of} can no longer be had", "{of} 个中有 {n} 个已无法获得"),
    ("left_broken", "{n} broken", "{n} 个损坏"), ("left_subset", "{n} not drawn", "{n} 个未被抽到"),
    ("left_alone", "{n} with nothing to compare", "{n} 个没有可比较的内容"),
    ("similarities", "Similarities", "相似度"),
    ("similarities_text", "Cosines of what belongs together and of what does not, each as shares of its own number. "
     "The figure beside a pair is the chance that a right pair is more alike than a wrong one: 0.5 says nothing, 1 is "
     "perfect.",
     "成对内容与不成对内容的余弦相似度，各按自身总数的百分比画出。"
     "旁边的数字是“正确的一对比错误的一对更相似”的概率：0.5 等于没有区分，1 为完全分开。"),
    ("separation", "{value}", "{value}"),
    ("right_pairs", "belong together", "成对"), ("wrong_pairs", "do not", "不成对"),
    ("map", "Map of the embeddings", "特征分布图"),
    ("map_how", "{points} of {of} embeddings, drawn at random by a fixed seed and laid out by t-SNE from their "
     "principal components (deterministic; each modality centred on its own mean first, since modalities lie apart). "
     "Near on the map means alike: of the {neighbours} nearest neighbours of a point the map keeps {kept} (the "
     "principal components alone {kept_pca}); distances across it mean little. Lines join what belongs to one sample.",
     "从 {of} 个特征中按固定种子随机抽取 {points} 个，从主成分出发用 t-SNE 排布"
     "（结果确定；不同模态本来就相互分开，所以先各自减去均值）。"
     "图上相近即相似：每个点最近的 {neighbours} 个邻居，图中保留了 {kept}"
     "（只用主成分为 {kept_pca}）；较远的距离没有多少意义。"
     "连线把同一样本的各部分连在一起。"),
    ("colour_by", "Colour:", "颜色："), ("by_class", "class", "类别"), ("by_set", "data set", "数据集"),
    ("by_modality", "modality", "模态"), ("others", "others", "其他"),
    ("modality_image", "image", "图像"), ("modality_text", "text", "文本"), ("modality_audio", "audio", "声音"),
    ("retrievals", "Best and worst", "最好与最差"),
    ("direction_text_to_image", "Text to image", "文本检索图像"),
    ("direction_text_to_audio", "Text to audio", "文本检索声音"),
    ("direction_image_to_audio", "Image to audio", "图像检索声音"),
    ("direction_speakers", "Speakers", "说话人"),
    ("kind_best_title", "best", "最好"), ("kind_worst_title", "worst", "最差"),
    ("kind_random_title", "at random", "随机"),
    ("kind_best", "Right at once, with the greatest lead over the best wrong answer.", "首个结果就正确，且领先最多。"),
    ("kind_worst", "The right answer comes latest. It is framed in green where it is shown.",
     "正确答案排得最靠后。绿框为正确答案。"),
    ("kind_random", "Drawn by a fixed seed: what to expect.", "按固定种子抽取：代表一般情形。"),
    ("kind_trials", "Pairs of sounds; ✓ one speaker, ✗ two. Below them the cosine of their features.",
     "成对的声音；✓ 同一说话人，✗ 不同说话人。下面是特征的余弦相似度。"),
    ("place", "right one at rank {rank} of {candidates}", "正确答案排第 {rank}，共 {candidates} 个"),
    ("at_rank", "rank {rank}", "第 {rank}"),
    # ---- runs side by side
    ("title_compare", "Runs side by side", "多次运行的比较"), ("run", "Run", "运行"), ("setting", "Setting", "设置"),
    ("page", "Page", "网页"),
    ("kind_of_training", "training", "训练"), ("kind_of_evaluation", "evaluation", "评测"),
    ("settings", "Settings that differ", "不同的设置"), ("settings_same", "The same in all.", "全部相同。"),
    ("compare_text", "▲ better, ▼ worse than A: 95 % intervals with no value in common. Other differences may be "
     "chance.",
     "▲ 好于 A，▼ 差于 A：两个 95 % 置信区间没有共同的值。其他差别可能只是偶然。"),
    ("compare_other", "Not all were evaluated on the samples of A: the figures of those do not "
     "compare, and have no mark.",
     "有的运行评测所用的样本与 A 不同：它们的指标不能比较，也不作标记。"),
    ("time_and_memory", "Time and memory", "用时与内存"),
    # ---- the report
    ("what", "What", "项目"), ("fact", "Value", "内容"), ("created", "Written", "生成时间"),
    ("command", "Command", "命令"), ("model", "Model, parameters", "模型，参数量"),
    ("tower_image", "Pretrained tower of images", "预训练图像编码器"),
    ("tower_text", "Pretrained tower of texts", "预训练文本编码器"),
    ("tower_audio", "Pretrained tower of sounds", "预训练音频编码器"),
    ("tower", "`{source}`, licence {licence}, {parameters} parameters, sha256 {digest}; {stages}",
     "`{source}`，许可 {licence}，{parameters} 个参数，sha256 {digest}；{stages}"),
    ("frozen", "frozen in {}", "冻结于 {}"), ("trained", "trained in {}", "训练于 {}"),
    ("checkpoint", "Weights", "权重文件"),
    ("best", "Chosen on validation data", "按验证集选出"),
    ("best_text", "stage {stage}, epoch {epoch}, validation loss {loss}",
     "阶段 {stage}，第 {epoch} 轮，验证损失 {loss}"),
    ("best_none", "no validation: the newest weights, stage {stage}, epoch {epoch}",
     "没有验证：最新的权重，阶段 {stage}，第 {epoch} 轮"),
    ("device", "Device, precision", "设备，精度"),
    ("duration", "Training time, validation included", "训练用时（含验证）"),
    ("results", "Results", "评测结果"),
    ("results_text",
     "Split `{split}`. Chance is the exact expectation under a random order; candidates are what each query chooses "
     "from, each file once. Equal scores count against the model. Intervals: bootstrap over queries, 95 %. Of "
     "median_rank, EER and minDCF less is better. R@K counts equal captions of a file once, and every file that has "
     "the words is right; `_per_caption` counts as papers do: each caption is a query, only its own file is right.",
     "数据划分：`{split}`。“随机水平”是随机排序下的精确期望值，“候选数”是每个查询可选的数量，同一个文件只算一个。"
     "分数相同时按对模型不利的顺序计算。区间为对查询做自助法得到的 95 % 置信区间。median_rank、EER 和 minDCF 越小越好。"
     "R@K 把同一文件的相同描述只算一次，凡有这句话的文件都算正确；"
     "`_per_caption` 是论文的算法：每句描述都是一个查询，只有它自己的文件算正确。"),
    ("nothing", "Nothing was evaluated: this split has no two samples with two modalities, labels or speakers. Add "
     "lines with this split to the list, or another set.",
     "没有可评测的内容：这一划分里没有两个含两种模态、标签或说话人的样本。请在清单里加上写有这一划分的行，或换用别的数据集。"),
    ("pair", "Pair", "模态对"), ("metric", "Metric", "指标"), ("value", "Value", "数值"),
    ("interval", "95 % interval", "95 % 区间"), ("chance", "Chance", "随机水平"), ("times", "x chance", "随机的倍数"),
    ("candidates", "Candidates", "候选数"), ("queries", "Queries", "查询数"),
    ("samples", "{samples} of {of} samples", "使用 {of} 个样本中的 {samples} 个"),
    ("no_figures", "no figures, for which two samples are needed that can be compared",
     "没有指标，至少要有两个可以比较的样本"),
    ("subset", "a random part, drawn by seed {subset_seed}", "为随机抽取的一部分（种子 {subset_seed}）"),
    ("broken", "broken files left out: {broken}", "跳过的损坏文件：{broken}"),
    ("trained_on", "{trained_on} of them were trained on: these figures do not tell how it does on new samples",
     "其中 {trained_on} 个参加过训练：这些数字不能说明对新样本的效果"),
    ("near", "near-equal to a training file (re-encoded, resized): {}",
     "与某个训练文件几乎相同（重新编码、缩放等）：{}"),
    ("nonfinite", "features that are not finite, counted as errors: {}", "含非有限值、按错误计的特征：{}"),
    ("without_symbols", "Without letters, digits and signs, which their shapes alone tell apart.",
     "不含字母、数字和符号（它们仅凭形状即可区分）。"),
    ("one_language", "With the captions of one language alone, of the files that have captions in all.",
     "只用一种语言的描述，且只含各语言都有描述的文件。"),
    ("trials", "speaker trials: {}", "说话人验证的试验：{}"), ("sentence_end", "; ", "；"),
    ("gallery", "Examples", "检索示例"),
    ("gallery_text", "Held-out captions drawn at random and their best answers; a green frame marks a right one.",
     "随机抽取的留出描述及其最佳结果；绿框为正确答案。"),
    ("gallery_image", "Text to image", "文本检索图像"), ("gallery_audio", "Text to audio", "文本检索声音"),
    ("query", "Query", "查询"), ("set", "Set", "数据集"), ("rank", "Rank of the right one", "正确答案的名次"),
    ("best_answer", "Caption of the best answer", "首个结果的描述"),
    ("curves", "Curves", "曲线"), ("losses", "training loss by stage and part", "各阶段、各部分的训练损失"),
    ("progress", "validation loss, retrieval, learning rate, speed", "验证损失、检索指标、学习率、速度"),
    ("stages", "Stages", "训练阶段"), ("stage_stage", "Stage", "阶段"), ("stage_epochs", "Epochs", "轮数"),
    ("stage_steps", "Steps", "步数"), ("stage_samples", "Samples seen", "看过的样本数"),
    ("stage_seconds", "Time", "用时"),
    ("stage_samples_per_s", "Samples/s", "样本/秒"), ("stage_data_wait_pct", "Waiting for data, %", "等待数据 %"),
    ("stage_predicted_gib", "Predicted peak of tensors, GiB", "张量预测峰值 GiB"),
    ("stage_measured_gib", "Measured of them, GiB", "其实测 GiB"),
    ("stage_peak_gib", "Measured in all, GiB", "全部实测峰值 GiB"),
    ("stage_loss", "Training loss, last tenth", "训练损失（最后十分之一）"),
    ("stages_text",
     "Compare the predicted peak with what was measured of it: on a CPU that is the process less what it held before "
     "the model was made (Python, libraries, data read), on CUDA all that the allocator took.",
     "预测峰值应与“其实测”相比：在 CPU 上是进程的内存减去建立模型之前已占的（Python、库、读入的数据），"
     "在 CUDA 上是分配器占用的全部。"),
    ("after_stages", "Validation after each stage", "各阶段结束时的验证"),
    ("after_stages_text", "R@1 of all pairs on validation data at the end of each stage that contrasts. Where a figure "
     "falls, a later stage has made the model forget.",
     "每个含对比目标的阶段结束时，各配对在验证集上的 R@1。数字下降，就是后面的阶段让模型忘记了先前学到的。"),
    ("events", "Events", "事件"), ("data", "Data", "数据"), ("split", "Split", "划分"),
    ("counts", "Samples by kind", "各类样本数"), ("licence", "Licence", "许可"),
    ("digests", "Digest of the lists of samples:", "样本清单的摘要："),
    ("available", "Sets of which a part is gone: compare figures only where the list of samples is the same.",
     "有一部分已经消失的数据集：样本清单相同，数字才能比较。"),
    ("samples_of", "Samples / listed", "现有 / 名单"), ("environment", "Environment", "环境"),
    ("platform", "Platform", "平台"), ("changed", " with uncommitted changes", "，有未提交的修改"),
    ("no_git", "not a git repository", "不是 git 仓库"), ("config", "Configuration", "完整配置"),
)}


def locale_language() -> str:
    """"zh" where the environment asks for Chinese (LC_ALL, else LC_MESSAGES, else LANG), "en" elsewhere."""
    asked = next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), "")
    return "zh" if asked.lower().startswith("zh") else "en"


def distinct(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures by data set, without "all" where these equal those of a single set."""
    return {name: pairs for name, pairs in figures.items()
            if name != "all" or all(pairs != other for key, other in figures.items() if key != "all")}


def number(value: Any) -> str:
    """Whole numbers with commas, others with four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{round(value):,}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def interval(figure: Mapping[str, Any]) -> str:
    return "-" if figure["low"] is None else f"{number(figure['low'])} - {number(figure['high'])}"


def times(metric: str, figure: Mapping[str, Any]) -> str:
    """How many times chance a figure is, where more is better."""
    better = ("R@", "mAP", "top")
    if figure["value"] is None or not figure["chance"] or not any(word in metric for word in better):
        return "-"
    return f"{figure['value'] / figure['chance']:.1f}"


def duration(seconds: float | None) -> str:
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def percent(value: float | None) -> str:
    """A share in percent: two digits below ten, so that small chances do not vanish."""
    if value is None:
        return "-"
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 or not value else f"{100 * value:.2g} %"
